"""A VLUer of smaller numbers that begins as near to a trained one as its numbers allow.

At each place of the trained network two second moments are taken over samples: C, of the values, and G, of the
gradients of the output weighed with noise, which say how much the output depends on each direction there.

- The encoder's stream is only added to and convolved, so any basis will do: the student keeps the k directions with
  the largest eigenvalues of G^1/2 C G^1/2, those whose loss changes the output least (balanced truncation).
- Units behind an activation have no other basis: those with the largest C_jj G_jj stay, and the convolution or layer
  that reads them takes each one left out as its linear regression on those that stay (as in channel pruning,
  arXiv 1707.06168).
- Of the residual pairs the student has fewer: as many as it wants, evenly spaced, the first and the last among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.vluer import BaseVLUer, VLUer

_EQUAL = ("latent_channels", "layers", "decoder_layers", "use_decoder", "use_cell")
_AT_MOST = ("channels", "pairs", "hidden", "query_channels")


def check_narrowing(teacher: BaseVLUer, student: BaseVLUer) -> None:
    """Refuse a student whose weights cannot come from this teacher.

    Raises:
        ValueError: for another class than VLUer, or numbers that do not fit.
    """
    for what, net in (("teacher", teacher), ("net", student)):
        if type(net) is not VLUer:
            raise ValueError(f"{what}: only a VLUer can be narrowed, got a {type(net).__name__}")
    of, to = teacher.config, student.config
    for name in _EQUAL:
        if of[name] != to[name]:
            raise ValueError(f"net: {name}: expected the teacher's {of[name]}, got {to[name]}")
    for name in _AT_MOST:
        if to[name] > of[name]:
            raise ValueError(f"net: {name}: expected at most the teacher's {of[name]}, got {to[name]}")
    if not to.use_decoder:
        raise ValueError("net: only a VLUer with a decoder can be narrowed")


@dataclass
class _Moments:
    """Sums over positions at one place.

    Attributes:
        values: of products of values and a constant 1, which comes last; (n + 1) x (n + 1).
        gradients: of products of gradients; n x n.
    """

    values: Any = 0.0
    gradients: Any = 0.0

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Add positions, positions x n."""
        value = torch.cat([value.double(), value.new_ones(len(value), 1, dtype=torch.float64)], 1)
        self.values = self.values + value.T @ value
        gradient = gradient.double()
        self.gradients = self.gradients + gradient.T @ gradient

    def chosen(self, count: int) -> Tensor:
        """The places of the `count` units from which the others follow best, in order.

        One unit after another, each the one that takes most of what is left of trace(G C) once all units are
        regressed on those chosen and the constant.
        """
        n = len(self.values) - 1
        left = self.values[:n, :n] - torch.outer(self.values[:n, n], self.values[n, :n]) / self.values[n, n]
        units: list[int] = []
        for _ in range(count):
            variance = left.diagonal()
            gain = torch.einsum("ij,ik,kj->j", left, self.gradients, left) / variance.clamp(
                min=1e-12 * self.values[n, n]
            )
            gain[units] = -1.0
            units.append(unit := int(gain.argmax()))
            if variance[unit] > 0:
                left = left - torch.outer(left[:, unit], left[unit]) / variance[unit]
        return torch.tensor(sorted(units), device=left.device)

    def regression(self, kept: Tensor) -> Tensor:
        """All units from those kept and the constant: n x (kept + 1), a unit that is kept from itself alone."""
        n, k = len(self.values) - 1, len(kept)
        known = torch.cat([kept, kept.new_tensor([n])])
        products = self.values[known][:, known]
        ridge = 1e-8 * products.diagonal().mean() * torch.eye(k + 1, dtype=products.dtype, device=products.device)
        found = torch.linalg.solve(products + ridge, self.values[known][:, :n]).T.contiguous()
        found[kept] = torch.eye(k, k + 1, dtype=found.dtype, device=found.device)
        return found

    def directions(self, count: int) -> tuple[Tensor, Tensor]:
        """Into the directions that matter most, count x n, and back, n x count, whose columns are orthonormal."""
        n = len(self.values) - 1
        if count == n:
            same = torch.eye(n, dtype=self.values.dtype, device=self.values.device)
            return same, same
        values, vectors = torch.linalg.eigh(self.gradients)
        values = values.clamp(min=float(values.max()) * 1e-8)
        root, inverse = (vectors @ torch.diag(values**power) @ vectors.T for power in (0.5, -0.5))
        _, most = torch.linalg.eigh(root @ self.values[:n, :n] @ root)
        most = most[:, n - count :]
        back, scale = torch.linalg.qr(inverse @ most)
        return scale @ most.T @ root, back


@dataclass
class _Places:
    """Moments at the places of a VLUer by name."""

    net: VLUer
    moments: dict[str, _Moments] = field(default_factory=dict)
    _seen: list[tuple[str, bool, Tensor]] = field(default_factory=list)

    def modules(self) -> Iterable[tuple[str, nn.Module]]:
        """The place's name, and the module that reads it; what several modules read is one place."""
        pairs: Any = self.net.encoder.pairs
        for i, pair in enumerate(pairs):
            yield "stream", pair.conv1
            yield f"pair {i}", pair.conv2
        yield "stream", self.net.upsampler.first
        for i, layer in enumerate([*self.net.upsampler.hidden, self.net.upsampler.last]):
            yield f"query {i}", layer
        for i, layer in enumerate([*self.net.decoder.layers, self.net.decoder.conv_out]):  # type: ignore[misc]
            yield f"decoder {i}", layer

    def _note(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        self._seen.append((name, isinstance(module, nn.Linear), args[0]))

    def take(self, latents: Tensor, size: Size3d, noise: torch.Generator) -> None:
        """Add the moments of one batch."""
        hooks = [module.register_forward_pre_hook(partial(self._note, name)) for name, module in self.modules()]
        try:
            with torch.enable_grad():  # a gradient to every place, and none to a frozen weight
                output = self.net(latents.detach().requires_grad_(), size)
            output.backward(torch.randn(output.shape, generator=noise).to(output))
            for name, last, x in self._seen:
                assert x.grad is not None
                rows = (y.detach() if last else y.detach().movedim(1, -1) for y in (x, x.grad))
                self.moments.setdefault(name, _Moments()).add(*(y.flatten(0, -2) for y in rows))
        finally:
            self._seen.clear()
            for hook in hooks:
                hook.remove()


def narrow(teacher: VLUer, student: VLUer, samples: Iterable[tuple[Tensor, Size3d]], seed: int = 0) -> None:
    """Give a student the weights that take it nearest to its teacher without training.

    Args:
        teacher: a trained VLUer; stays as it is.
        student: one of smaller numbers, on the same device; its weights are replaced. With the teacher's own numbers it
            becomes the teacher.
        samples: batches of latents, B x C x T x h x w, and the sizes to upsample them to; at least one.
        seed: seed of the noise that the output is weighed with.

    Raises:
        ValueError: for a student that does not fit, see `check_narrowing`, or no samples.
    """
    check_narrowing(teacher, student)
    places, noise = _Places(teacher), torch.Generator().manual_seed(seed)
    frozen = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for latents, size in samples:
            places.take(latents, size, noise)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if not places.moments:
        raise ValueError("samples: expected at least one batch of latents, got none")
    with torch.no_grad():
        into, back = places.moments["stream"].directions(student.config.channels)
        _narrow_encoder(teacher, student, places.moments, into, back)
        _narrow_upsampler(teacher, student, places.moments, back)


def _narrow_encoder(teacher: VLUer, student: VLUer, moments: dict[str, _Moments], into: Tensor, back: Tensor) -> None:
    first: Any = teacher.encoder.conv_in
    _put(student.encoder.conv_in, _gives(into, first.weight), into @ first.bias.double())
    pairs: Any = student.encoder.pairs
    for kept_pair, pair in zip(kept_pairs(len(teacher.encoder.pairs), len(pairs)), pairs, strict=True):
        source: Any = teacher.encoder.pairs[kept_pair]
        place = moments[f"pair {kept_pair}"]
        kept = place.chosen(student.config.channels)
        _put(pair.conv1, _reads(source.conv1.weight, back)[kept], source.conv1.bias[kept])
        weight, bias = _from_kept(source.conv2, place.regression(kept))
        _put(pair.conv2, _gives(into, weight), into @ bias)


def _narrow_upsampler(teacher: VLUer, student: VLUer, moments: dict[str, _Moments], back: Tensor) -> None:
    old: Any = teacher.upsampler
    new: Any = student.upsampler
    kept = moments["query 0"].chosen(student.config.hidden)
    _put(new.first, _reads(old.first.weight, back)[kept], old.first.bias[kept])
    new.coordinates.weight.copy_(old.coordinates.weight[kept])
    known = moments["query 0"].regression(kept)
    for i, (source, layer) in enumerate(zip(old.hidden, new.hidden, strict=True), 1):
        weight, bias = _from_kept(source, known)
        kept = moments[f"query {i}"].chosen(student.config.hidden)
        _put(layer, weight[kept], bias[kept])
        known = moments[f"query {i}"].regression(kept)
    layers: Any = [*teacher.decoder.layers, teacher.decoder.conv_out]  # type: ignore[misc]
    narrow: Any = [*student.decoder.layers, student.decoder.conv_out]  # type: ignore[misc]
    # The decoder's layers add to the same channels.
    places = [moments[f"decoder {i}"] for i in range(len(layers))]
    both = _Moments(sum(place.values for place in places), sum(place.gradients for place in places))
    kept = both.chosen(student.config.query_channels)
    weight, bias = _from_kept(old.last, known)
    _put(new.last, weight[kept], bias[kept])
    for i, (source, layer) in enumerate(zip(layers, narrow, strict=True)):
        weight, bias = _from_kept(source, moments[f"decoder {i}"].regression(kept))
        last = layer is narrow[-1]
        _put(layer, weight if last else weight[kept], bias if last else bias[kept])


def kept_pairs(of: int, count: int) -> list[int]:
    """Which of the teacher's residual pairs the student has: evenly spaced, the first and the last among them."""
    return [round(i * (of - 1) / (count - 1)) for i in range(count)] if count > 1 else list(range(of))[:count]


def _from_kept(layer: Any, known: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that reads kept units alone; beside a border its constant is that of the inside."""
    weight = layer.weight.double()
    constant = (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ known[:, -1]
    return _reads(weight, known[:, :-1]), layer.bias.double() + constant


def _reads(weight: Tensor, back: Tensor) -> Tensor:
    """A layer's weight for inputs in another basis, of which `back` leads back."""
    return torch.einsum("oi...,ik->ok...", weight.double(), back)


def _gives(into: Tensor, weight: Tensor) -> Tensor:
    """A layer's weight for outputs in another basis, to which `into` leads."""
    return torch.einsum("ko,oi...->ki...", into, weight.double())


def _put(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
