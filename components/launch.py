"""How the app is launched: theme, style sheet, queue and file limits, in one place shared by app.py and the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr

from components.settings import Settings

ASSETS = Path(__file__).resolve().parent.parent / "assets"
# Gradio's own fonts lack most letters in semibold; IBM Plex has whole Regular and Bold files.
FONT = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
MONO = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))


def theme() -> gr.themes.Base:
    """Quiet greys and one accent; contrast checked in light and dark."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=[FONT, "system-ui", "sans-serif"],
        font_mono=[MONO, "ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
    )


def launch_settings(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for `Blocks.launch()`."""
    return {
        "theme": theme(),
        "css": "".join(path.read_text("utf-8") for path in sorted(ASSETS.glob("*.css"))),
        "server_name": os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if settings.public else "127.0.0.1"),
        "show_error": not settings.public,
        "ssr_mode": False,
        "enable_monitoring": False,
        "footer_links": [],
        "max_file_size": settings.max_upload_bytes,
        "blocked_paths": [str(settings.home)],
        "quiet": False,
        "share": False,
    }
