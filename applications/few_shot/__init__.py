"""Few-shot classification by implicit MAML and its relatives: ``python -m applications.few_shot``."""
