"""What the person who starts the app decides, read once from the environment and the command line.

Everything that differs between somebody's own machine (private) and a public Space is a field here, so that a handler
asks `settings.public` or a limit and never the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1024**3


@dataclass(frozen=True)
class Settings:
    """Mode, folders and limits. Sizes in bytes, lengths in characters unless a name says otherwise."""

    public: bool = False  # a Space: demo catalogue only, bounded rows and tokens, no folders of the visitor's choice
    home: Path = Path.home() / ".cache" / "llm-merge"  # converted demo models and the user's own measurements
    models_dir: Path | None = None  # folder whose subfolders are offered as models
    device: str = "auto"
    max_models: int = 8  # fine-tunes
    max_rows: int = 5000
    max_text_chars: int = 20_000_000
    max_upload_bytes: int = 50 * 1024**2
    max_prompt_chars: int = 20_000
    max_new_tokens: int = 1024
    live_memory: int = 8 * GIB  # for models held in memory to chat with and to measure
    max_download: int = 8 * GIB  # size of a merged model that a visitor may download
    demo_rows: int = 32  # held-out demo rows that the page scores at a time

    @classmethod
    def from_environment(cls, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Settings:
        """Settings for this process. A Space is recognised by `SPACE_ID`; `LLM_MERGE_HOME` moves the app's folder."""
        from llm_merge.demo import cache_folder

        env = os.environ if environment is None else environment
        parser = argparse.ArgumentParser(
            prog="app.py", description="Mix fine-tuned models. See why. Try before you save."
        )
        parser.add_argument("--models-dir", type=Path, help="a folder whose subfolders are offered as models")
        parser.add_argument(
            "--device", default=env.get("LLM_MERGE_DEVICE", "auto"), help="auto, cpu, cuda, cuda:1, mps"
        )
        options = parser.parse_args(list(arguments))
        home = Path(env["LLM_MERGE_HOME"]) if env.get("LLM_MERGE_HOME") else cache_folder()
        if env.get("SPACE_ID"):
            return cls.for_public(home, options.device)
        return cls(home=home, models_dir=options.models_dir, device=options.device)

    @classmethod
    def for_public(cls, home: Path, device: str = "auto") -> Settings:
        """What a Space may do: bounded work for anyone who passes by."""
        return cls(
            public=True,
            home=home,
            device=device,
            max_rows=64,
            max_text_chars=200_000,
            max_upload_bytes=1024**2,
            max_prompt_chars=2000,
            max_new_tokens=192,
            live_memory=6 * GIB,
            max_download=GIB,
        )
