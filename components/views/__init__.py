"""What to show, decided in plain functions of a session or a report. No Gradio below this line."""
