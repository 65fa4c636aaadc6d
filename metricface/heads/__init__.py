"""Classification heads over raw embeddings, for training with one weight vector per identity: head(embeddings, labels).

The head is dropped after training; only the embedder below it is kept. All take `streaming=True`, which never holds the
B x C logits; `metricface.heads.partial_fc.PartialFC` around one spreads its classes over ranks and samples them.
"""

from metricface.heads.arcface import ArcFace, CombinedMargin, SubCenterArcFace
from metricface.heads.cosface import CosFace
from metricface.heads.curricularface import CurricularFace
from metricface.heads.curve import target_curve
from metricface.heads.normface import COCO, NormFace, loss_lower_bound, scale_lower_bound
from metricface.heads.proxies import NPT, CContrastive, CTriplet
from metricface.heads.quality import AdaFace, MagFace
from metricface.heads.softmax import L2Softmax, Softmax, alpha_lower_bound
from metricface.heads.sphereface import LSoftmax, SphereFace
from metricface.heads.sphereface2 import SphereFace2

__all__ = [
    "COCO",
    "NPT",
    "AdaFace",
    "ArcFace",
    "CContrastive",
    "CTriplet",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "L2Softmax",
    "LSoftmax",
    "MagFace",
    "NormFace",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "SubCenterArcFace",
    "alpha_lower_bound",
    "loss_lower_bound",
    "scale_lower_bound",
    "target_curve",
]
