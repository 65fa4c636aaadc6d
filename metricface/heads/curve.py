"""What a head makes of the angle between an embedding and its own class."""

import torch
from torch import Tensor

from metricface.heads.base import Head
from metricface.heads.target import Target


@torch.no_grad()
def target_curve(head: Head, theta_rad: Tensor, *, length: float | Tensor = 1.0) -> Tensor:
    """The target logit over theta, divided by what the other classes' cosines are multiplied with.

    theta_rad: angles in [0, pi], any shape, in radians. length: of the raw embedding, a number or of that shape;
    AdaFace and MagFace look at it. Returns that shape: cos(theta) for a head without a margin; further below it, the
    more the own class is asked for; SphereFace2 bends the cosine (g) even with margin 0. SphereFace and
    L-Softmax answer for their present lambda, AdaFace for its present averages.
    Raises ValueError for angles outside of [0, pi], lengths below 0, and the proxy losses, which have no target logit.
    """
    theta_rad = torch.as_tensor(theta_rad)
    theta_rad = theta_rad if theta_rad.is_floating_point() else theta_rad.float()
    if not bool(((theta_rad >= 0) & (theta_rad <= torch.pi + 1e-6)).all()):
        raise ValueError("theta_rad must lie in [0, pi]: the angle between two vectors, in radians.")
    lengths = torch.as_tensor(length, dtype=theta_rad.dtype, device=theta_rad.device).expand_as(theta_rad).flatten()
    if not bool((lengths >= 0).all()):
        raise ValueError("length must be 0 or more: that of an embedding.")
    flat = theta_rad.flatten()
    target = Target(flat.cos(), flat.sin().clamp_min(0.0), lengths)
    return head.target_cos(target).view(theta_rad.shape)
