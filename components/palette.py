"""The colours of models, the same in every chart, bar and column, on light and on dark.

After Okabe and Ito's colour-blind-safe set, darkened or lightened until each has a contrast of 3 : 1 on both of the
page's backgrounds. A colour never stands alone: a name is always beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

BASE = "#7A828E"
MERGED = "#8B5CF6"
SPECIALISTS = ("#0072B2", "#D55E00", "#009E73", "#C2649A", "#B98100", "#3391C6", "#A0703A", "#6B8E23")
GRID = "rgba(128,128,128,.25)"
WARNING = "#C2410C"

LIGHT_BACKGROUND, DARK_BACKGROUND = "#FFFFFF", "#0B0F19"


def model_colors(is_base: Sequence[bool]) -> tuple[str, ...]:
    """One colour per model, in order: grey for the base, the specialists by their place among the specialists."""
    place, colors = 0, []
    for base in is_base:
        colors.append(BASE if base else SPECIALISTS[place % len(SPECIALISTS)])
        place += 0 if base else 1
    return tuple(colors)


def css_variables() -> str:
    """The same colours for style sheets: --model-base, --model-1 … --model-8, --merged, --warning."""
    names = {"model-base": BASE, "merged": MERGED, "warning": WARNING}
    names |= {f"model-{place}": color for place, color in enumerate(SPECIALISTS, start=1)}
    return ":root{" + "".join(f"--{name}:{color};" for name, color in names.items()) + "}\n"


def contrast(color: str, background: str) -> float:
    """WCAG 2 contrast ratio of two "#RRGGBB" colours, 1 to 21."""
    high, low = sorted((_luminance(color), _luminance(background)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
