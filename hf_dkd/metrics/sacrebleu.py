"""BLEU and chrF of translations, as sacreBLEU counts them (Post 2018, Popović 2015)."""

import datasets
import evaluate
from sacrebleu import corpus_bleu, corpus_chrf


class SacreBLEU(evaluate.Metric):
    """`compute(predictions=texts, references=texts, tokenize="13a")` → `{"bleu", "chrf"}`, both from 0 to 100.

    Both are counted over the whole corpus, with one reference for each text. `tokenize` is sacreBLEU's tokenizer, which
    BLEU alone needs: `"13a"`, `"zh"`, `"intl"`, `"char"` or `"none"`.
    """

    def _info(self) -> evaluate.MetricInfo:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(texts))

    def _compute(self, predictions: list[str], references: list[str], tokenize: str = "13a") -> dict[str, float]:
        bleu = corpus_bleu(predictions, [references], tokenize=tokenize)
        return {"bleu": float(bleu.score), "chrf": float(corpus_chrf(predictions, [references]).score)}
