"""Single-loop and two-loop stochastic bilevel methods on mini-batches, one step at a time::

    method = SOBA(params, hparams, train_loss, val_loss, inner_lr=Decay(0.1), outer_lr=Decay(0.1))
    for inner_batch, outer_batch in zip(train_batches, val_batches):
        record = method.step(inner_batch, outer_batch)

Start with `SOBA`; `SABA` or `SRBA` where the data is a finite set and high accuracy counts; `F2SA` where second
derivatives fail. `step_sizes` measures step sizes that survive. `Stochastic` says what all share.
"""

from .amigo import AmIGO
from .base import Step, Stochastic
from .bome import BOME
from .bsa import BSA
from .f2sa import F2SA
from .fsla import FSLA
from .ma_soba import MASOBA
from .mrbo import MRBO
from .oracles import Draws
from .saba import SABA
from .schedule import Decay, TorchSchedule
from .sizes import step_sizes
from .soba import SOBA
from .spaba import SPABA
from .srba import SRBA
from .stocbio import StocBiO
from .sustain import SUSTAIN
from .ttsa import TTSA
from .vrbo import VRBO

__all__ = [
    "BOME",
    "BSA",
    "F2SA",
    "FSLA",
    "MASOBA",
    "MRBO",
    "SABA",
    "SOBA",
    "SPABA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VRBO",
    "AmIGO",
    "Decay",
    "Draws",
    "Step",
    "StocBiO",
    "Stochastic",
    "TorchSchedule",
    "step_sizes",
]
