"""`influence`: what each training example did to a prediction, by inverse curvature products that tell their error.

Koh and Liang 2017. With ``F(y) = mean_i l_i(y) + penalty(y)`` minimised at y, and ``A = H + damping``, H the curvature
of F, the influence of example i on the loss of query q is ``-g_q^T A^{-1} g_i``: the slope of that loss by the weight
of the example. Leaving out a set S, the n of the mean as it is, changes it by about ``sum_S g_q^T A^{-1} g_i / n``.
The error is of second order, as large as the part of the params that an example decides alone.
"""

from .attribution import Influence, influence
from .projected import ProjectedInfluence
from .scores import InfluenceScores

__all__ = ["Influence", "InfluenceScores", "ProjectedInfluence", "influence"]
