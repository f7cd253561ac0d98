"""Smooth bodies in closed form: ellipsoids and tapered capsules under an orthographic camera.

An ellipsoid {p : |L⁻¹(p − μ)| = 1} with Σ = LLᵀ projects to the ellipse of Σ's upper-left 2×2
block, and the depth of its front is the conditional mean of z plus the conditional deviation times
√(1 − q²): exact, no ray marching. A union of bodies blends silhouettes and depths with a soft
maximum, so that a shoulder flows into a back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class Body:
    """An ellipsoid (``b is None``: centre ``a``, axes ``L``) or a tapered capsule from a to b.

    Units are the picture's (x right, y up, z toward the viewer). ``rest`` and ``rest_size`` place
    the body in the animal's coat, so that markings stay on the skin when it moves.
    """

    part: str
    layer: str
    a: Array
    L: Array | None = None
    b: Array | None = None
    ra: float = 0.0
    rb: float = 0.0
    rest: Array = field(default_factory=lambda: np.zeros(3))
    rest_size: Array = field(default_factory=lambda: np.ones(3))
    tint: str = "coat"

    def transformed(self, matrix: Array, scale: float, offset: Array) -> Body:
        """The body after p → scale · matrix · p + offset (matrix orthogonal)."""
        return Body(
            part=self.part,
            layer=self.layer,
            a=scale * (matrix @ self.a) + offset,
            L=None if self.L is None else scale * (matrix @ self.L),
            b=None if self.b is None else scale * (matrix @ self.b) + offset,
            ra=self.ra * scale,
            rb=self.rb * scale,
            rest=self.rest,
            rest_size=self.rest_size,
            tint=self.tint,
        )

    def bounds(self) -> tuple[float, float, float, float]:
        """(x0, x1, y0, y1) of the silhouette."""
        if self.L is not None:
            half = np.sqrt((self.L[:2] ** 2).sum(1))
            return (
                self.a[0] - half[0],
                self.a[0] + half[0],
                self.a[1] - half[1],
                self.a[1] + half[1],
            )
        assert self.b is not None
        return (
            min(self.a[0] - self.ra, self.b[0] - self.rb),
            max(self.a[0] + self.ra, self.b[0] + self.rb),
            min(self.a[1] - self.ra, self.b[1] - self.rb),
            max(self.a[1] + self.ra, self.b[1] + self.rb),
        )

    def evaluate(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        """Signed distance (< 0 inside), front depth, unit normal and coat position (3, …)."""
        if self.b is None:
            return self._ellipsoid(x, y)
        return self._capsule(x, y)

    def _ellipsoid(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        assert self.L is not None
        cov = self.L @ self.L.T
        inv2 = np.linalg.inv(cov[:2, :2])
        slope = cov[2, :2] @ inv2
        sz = float(np.sqrt(max(cov[2, 2] - slope @ cov[:2, 2], 1e-12)))
        u, v = x - self.a[0], y - self.a[1]
        gu = inv2[0, 0] * u + inv2[0, 1] * v
        gv = inv2[0, 1] * u + inv2[1, 1] * v
        q2 = u * gu + v * gv
        q = np.sqrt(q2 + 1e-12)
        dist = (q - 1.0) * q / np.sqrt(gu * gu + gv * gv + 1e-9)
        rise = np.sqrt(np.maximum(1.0 - q2, 0.0)) - 1.5 * np.maximum(q - 1.0, 0.0)
        dz = slope[0] * u + slope[1] * v + sz * rise
        inv3 = np.linalg.inv(self.L)
        local = (
            inv3[:, 0, None, None] * u + inv3[:, 1, None, None] * v + inv3[:, 2, None, None] * dz
        )
        normal = np.tensordot(inv3.T, local, 1)
        normal /= np.sqrt((normal * normal).sum(0)) + 1e-9
        coat = self.rest[:, None, None] + self.rest_size[:, None, None] * local
        return dist, self.a[2] + dz, normal, coat

    def _capsule(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        assert self.b is not None
        ab = self.b - self.a
        length2 = float(ab[0] ** 2 + ab[1] ** 2) + 1e-9
        u, v = x - self.a[0], y - self.a[1]
        t = np.clip((u * ab[0] + v * ab[1]) / length2, 0.0, 1.0)
        radius = self.ra + (self.rb - self.ra) * t
        du, dv = u - t * ab[0], v - t * ab[1]
        away = np.sqrt(du * du + dv * dv + 1e-12)
        dist = away - radius
        ratio = away / np.maximum(radius, 1e-6)
        nz = np.sqrt(np.maximum(1.0 - ratio * ratio, 0.0))
        dz = t * ab[2] + radius * (nz - 1.5 * np.maximum(ratio - 1.0, 0.0))
        inv = 1.0 / np.maximum(away, radius)
        normal = np.stack([du * inv, dv * inv, nz])
        coat = np.stack(
            [
                self.rest[0] + self.rest_size[0] * normal[0],
                self.rest[1] - self.rest_size[1] * t,
                self.rest[2] + self.rest_size[2] * normal[2],
            ]
        )
        return dist, self.a[2] + dz, normal, coat


@dataclass
class Blend:
    """A union of bodies on the pixel grid; outside its silhouette ``dist`` > 0.

    dist, depth: (H, W); normal, coat: (3, H, W); index: (H, W) the body in front, −1 far outside.
    """

    dist: Array
    depth: Array
    normal: Array
    coat: Array
    index: Array


def blend(bodies: list[Body], x: Array, y: Array, smooth: float, margin: float) -> Blend:
    """Blend bodies on a pixel grid.

    Args:
        bodies: what to unite.
        x, y: (H, W) pixel centres in picture units; rows from top to bottom.
        smooth: radius over which silhouettes and depths flow into each other.
        margin: how far outside the silhouettes distances are needed.
    """
    height, width = x.shape
    pixel = 1.0 / width
    reach = margin + 4 * smooth + pixel
    near = np.zeros((height, width), np.float32)
    weight = np.full((height, width), 1e-12, np.float32)
    depth = np.full((height, width), -9.0, np.float32)
    normal = np.zeros((3, height, width), np.float32)
    coat = np.zeros((3, height, width), np.float32)
    index = np.full((height, width), -1, np.int16)
    for i, body in enumerate(bodies):
        x0, x1, y0, y1 = body.bounds()
        c0 = max(int((x0 - reach) * width), 0)
        c1 = min(int((x1 + reach) * width) + 2, width)
        r0 = max(int((1 - y1 - reach) * height), 0)
        r1 = min(int((1 - y0 + reach) * height) + 2, height)
        if c0 >= c1 or r0 >= r1:
            continue
        s = np.s_[r0:r1, c0:c1]
        dist, z, n, c = body.evaluate(x[s], y[s])
        near[s] += np.exp(np.clip(-dist / smooth, -60, 60))
        w = np.exp(np.clip(z / (0.6 * smooth), -50, 50) - np.maximum(dist, 0) / (0.25 * smooth))
        weight[s] += w
        normal[:, r0:r1, c0:c1] += w * n
        coat[:, r0:r1, c0:c1] += w * c
        front = (z > depth[s]) & (dist < 0.5 * pixel + smooth)
        depth[s] = np.where(front, z, depth[s])
        index[s] = np.where(front, i, index[s])
    dist = np.where(near > 1e-20, -smooth * np.log(np.maximum(near, 1e-20)), 1.0)
    normal /= weight
    normal /= np.sqrt((normal * normal).sum(0)) + 1e-9
    return Blend(dist.astype(np.float32), depth, normal, coat / weight, index)


def coverage(dist: Array, pixel: float, softness: float = 0.0) -> Array:
    """The covered share of each pixel for a signed distance, over one pixel or more."""
    return np.clip(0.5 - dist / (pixel + softness), 0.0, 1.0)
