"""How near a generated answer is to the reference: exact match, ROUGE-L, chrF and BLEU, each from 0 to 1.

Higher is better everywhere. Chinese and Japanese are compared character by character, since nothing separates their
words. Two texts in, one number out: this module knows no model and no rows.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Han characters, as the inside of a character class."""
_TOKENS = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_HAS_CJK = re.compile(rf"[{CJK}]")


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same text, white space at the ends and repeated white space apart; else 0."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of tokens (Lin 2004), by rouge-score, with the tokens of `tokens_of`."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def chrf(answer: str, reference: str) -> float:
    """chrF (Popović 2015): F2 of character n-grams up to 6, by sacrebleu for one sentence."""
    return _fraction(_chrf().sentence_score(answer, [reference]).score)


def bleu(answer: str, reference: str) -> float:
    """BLEU of one sentence by sacrebleu, of the n-gram orders that occur; Han characters are tokens of their own."""
    tokenizer = "zh" if _HAS_CJK.search(reference) else "13a"
    return _fraction(_bleu(tokenizer).sentence_score(answer, [reference]).score)


def tokens_of(text: str) -> list[str]:
    """Lower-cased words of letters and digits; each kana or Han character by itself."""
    return _TOKENS.findall(text.lower())


def _fraction(score: float) -> float:
    """Percent as a fraction; sacrebleu's rounding may pass 100 by a hair."""
    return min(score / 100, 1.0)


class _Tokenizer:
    """What rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return tokens_of(text)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True, tokenize=tokenizer)
