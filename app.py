"""Start the page: `python app.py`, then open http://127.0.0.1:7860. Nothing loads or launches at import."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by gradio at import: no request leaves unasked
# Read by torch's OpenMP when it is loaded: threads that wait for work sleep, since on shared cores, as a Space's are,
# spinning ones keep others from theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    from components.demo_setup import prepare_in_background
    from components.launch import launch_settings
    from components.settings import Settings
    from components.shell import build_app

    settings = Settings.from_environment(sys.argv[1:])
    prepare_in_background()
    build_app(settings).launch(**launch_settings(settings))


if __name__ == "__main__":
    main()
