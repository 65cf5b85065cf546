"""Few-shot classification by implicit MAML and its relatives: ``python -m applications.few_shot``."""

from applications.few_shot.classifier import Classifier, FewShot

__all__ = ["Classifier", "FewShot"]
