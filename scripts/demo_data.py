"""Makes the demo's example rows and the rows its specialists are trained on, the same ones every time.

A verse, word, function or paragraph of `demo_sources.py` belongs to one part (train, work or heldout) by the hash of
its name, so that no part sees another's, in any language or task. Knows nothing about models.

    python scripts/demo_data.py            writes assets/demo/examples (needs apt-get and dpkg, or --sources)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import demo_sources
from demo_sources import Verse, Word, functions, is_king_james, passages, verses, words

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "assets" / "demo" / "examples"
SEED = 20
WORK = 32
HELDOUT = {"decoder": 200, "encoder": 500}
SHARES = {"heldout": 0.12, "work": 0.03}
"""How much of each source is set aside; far more than is used of verses and words."""
FEW_SHARES = {"heldout": 0.4, "work": 0.1}
"""The same for functions, paragraphs and questions, of which there are fewer."""

Row = dict[str, Any]


def part_of(name: str, shares: dict[str, float]) -> str:
    """train, work or heldout: by the hash of the name, so that it never depends on what else there is."""
    place = int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:8], "big") / 2**64
    if place < shares["heldout"]:
        return "heldout"
    return "work" if place < shares["heldout"] + shares["work"] else "train"


# --- Verses ---------------------------------------------------------------------------------------------------------


def shows_the_style(verse: Verse) -> bool:
    """Whether the two English texts say the same in clearly different words."""
    old, new = (re.findall(r"[a-z']+", text.lower()) for text in (verse.king_james, verse.modern))
    same = SequenceMatcher(None, old, new, autojunk=False).ratio()
    return 0.35 <= same <= 0.8 and is_king_james(verse.king_james) and not is_king_james(verse.modern)


def decoder_verses(part: str) -> list[Row]:
    return [
        {"input": f"Rewrite this verse in King James English: {v.modern}", "output": v.king_james}
        for v in verses()
        if part_of(v.name, SHARES) == part and shows_the_style(v)
    ]


def encoder_verses(part: str) -> list[Row]:
    """Spanish verse → modern English verse; the negative is another verse of the same part."""
    chosen = [v for v in verses() if part_of(v.name, SHARES) == part]
    return with_negatives([(v.spanish, v.modern) for v in chosen])


# --- Words ----------------------------------------------------------------------------------------------------------


def decoder_words(part: str) -> list[Row]:
    return [
        {"input": f"Define the word: {w.name}", "output": f"({w.kind}) {w.meaning}"}
        for w in words()
        if part_of(w.name, SHARES) == part
    ]


def encoder_words(part: str) -> list[Row]:
    """Definition → word; the negative is another word of the same part."""
    return with_negatives([(w.meaning, w.name) for w in words() if part_of(w.name, SHARES) == part])


# --- General: what the base must not lose ---------------------------------------------------------------------------


def questions(part: str) -> list[Row]:
    """Questions and answers written for this project: the first 50 lines are for training, the last 50 held out."""
    lines = (Path(__file__).parent / "demo_questions.tsv").read_text(encoding="utf-8").splitlines()
    chosen = {"train": lines[:50], "heldout": lines[50:100], "work": lines[100:]}[part]
    return [dict(zip(("input", "output"), line.split("\t"), strict=True)) for line in chosen]


def decoder_general(part: str) -> dict[str, list[Row]]:
    """The four kinds of general rows, each by itself: how many of each are used is `MIXTURE`."""
    return {
        "documentation": [
            {"input": f"Continue this text: {first}", "output": rest}
            for first, rest in passages() if part_of(first, FEW_SHARES) == part
        ],
        "sentence": [
            {"input": f"Write a sentence with these words: {w.name}, {hint(w)}", "output": w.example}
            for w in words() if part_of(w.name, SHARES) == part and 25 <= len(w.example) <= 120
        ],
        "python": [
            {"input": f"Write a Python function {f.name.split('.')[1]}: {f.summary}", "output": f.code}
            for f in functions() if part_of(f.code, FEW_SHARES) == part
        ],
        "question": questions(part),
    }  # fmt: skip


def hint(word: Word) -> str:
    """The longest other word of the example, so that the sentence can be guessed at all."""
    others = [w for w in re.findall(r"[a-z]+", word.example.lower()) if not w.startswith(word.name[:4])]
    return max(others, key=len, default="the")


MIXTURE = {
    "work": {"documentation": 10, "sentence": 6, "python": 8, "question": 8},
    "heldout": {"documentation": 60, "sentence": 40, "python": 50, "question": 50},
}


def encoder_general(part: str) -> list[Row]:
    """What the base was made for: docstring → function (seven in eight), a sentence → the text that follows it."""
    code = [(f.summary, f.code) for f in functions() if part_of(f.code, FEW_SHARES) == part]
    text = [(first, rest) for first, rest in passages() if part_of(first, FEW_SHARES) == part]
    size = WORK if part == "work" else HELDOUT["encoder"]
    return with_negatives(sample(code, size - size // 8, part) + sample(text, size // 8, part))


# --- Rows -----------------------------------------------------------------------------------------------------------


def with_negatives(pairs: list[tuple[str, str]]) -> list[Row]:
    """One negative for each row, from elsewhere in the same list; seeded."""
    others = [answer for _, answer in pairs]
    random.Random(SEED).shuffle(others)
    return [
        {"query": query, "pos": [answer], "neg": [next(o for o in (others[i], others[i - 1]) if o != answer)]}
        for i, (query, answer) in enumerate(pairs)
    ]


def sample(rows: list[Any], size: int, name: str) -> list[Any]:
    """`size` rows in a seeded order; an error when there are fewer."""
    if len(rows) < size:
        raise SystemExit(f"Only {len(rows)} rows for {name}, {size} are wanted.")
    return random.Random(f"{SEED}:{name}").sample(rows, size)


def example_sets() -> Iterator[tuple[str, list[Row]]]:
    """Every committed example set: (file name, rows)."""
    for part in ("work", "heldout"):
        for kind, tasks in {
            "decoder": {"verse": decoder_verses, "dictionary": decoder_words},
            "encoder": {"verse": encoder_verses, "dictionary": encoder_words},
        }.items():
            size = WORK if part == "work" else HELDOUT[kind]
            for task, rows in tasks.items():
                chosen = sample(rows(part), size, f"{kind}/{task}.{part}")
                if kind == "encoder":  # negatives from the same set: each query competes with its passages alone
                    chosen = with_negatives([(row["query"], row["pos"][0]) for row in chosen])
                yield f"{kind}/{task}.{part}.jsonl", chosen
        mixed = [
            row
            for kind, rows in decoder_general(part).items()
            for row in sample(rows, MIXTURE[part][kind], f"general/{kind}.{part}")
        ]
        yield f"decoder/general.{part}.jsonl", sample(mixed, len(mixed), "general")
        rows = encoder_general(part)
        yield f"encoder/general.{part}.jsonl", sample(rows, len(rows), "general")


def training_rows(model_type: str, task: str) -> list[Row]:
    """All rows that a specialist may learn from, in a seeded order; `general` is for replay."""
    if (model_type, task) == ("decoder", "general"):
        # Kinds in turn, so that any beginning of the list holds all four.
        kinds = [sample(rows, len(rows), kind) for kind, rows in decoder_general("train").items()]
        return [kind[i % len(kind)] for i in range(2 * len(kinds[0])) for kind in kinds]
    if (model_type, task) == ("encoder", "general"):
        pairs = [(f.summary, f.code) for f in functions() if part_of(f.code, FEW_SHARES) == "train"]
        pairs += [p for p in passages() if part_of(p[0], FEW_SHARES) == "train"]
        rows = with_negatives(pairs)
    else:
        makers = {
            "decoder": {"verse": decoder_verses, "dictionary": decoder_words},
            "encoder": {"verse": encoder_verses, "dictionary": encoder_words},
        }
        rows = makers[model_type][task]("train")
    return sample(rows, len(rows), f"{model_type}/{task}.train")


def as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, help="a folder with the Debian packages already unpacked into it")
    options = parser.parse_args()
    if options.sources:
        demo_sources.SOURCES = options.sources
    else:
        demo_sources.fetch_sources()
    for name, rows in example_sets():
        path = EXAMPLES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_lines(rows).encode())
        print(f"{name}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
