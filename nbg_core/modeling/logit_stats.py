"""The numbers through which the joint loss depends on a row of logits, and the gradient that follows from them.

Shapes: T response tokens, V vocabulary, K stored entries of the widest position, c rows of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.lm_head_tiles import lm_head_kernels, log_sum_exp_of


class LogitStats:
    """Collects these numbers for all rows, a tile at a time (`read`), and writes gradients into tiles
    (`write_gradient`)."""

    def __init__(self, n: int, targets: TeacherTargets, temperature: float, bucket: bool, like: Tensor):
        self.targets, self.temperature, self.bucket = targets, temperature, bucket
        self.at_ids = like.new_empty(targets.ids.shape)  # [T, K] logits at the stored ids
        self.logps = like.new_zeros(n)  # [T] log-prob of the token
        self.log_z = like.new_zeros(n)  # [T] log-sum-exp of the logits
        self.log_z_tempered = like.new_zeros(n)  # [T] log-sum-exp of the logits / temperature
        self.log_out = like.new_zeros(n)  # [T] the same over the ids outside the top entries

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """Log p [c, K] at the stored ids, at the temperature of the divergence; by default of all rows."""
        return self.at_ids[rows] / self.temperature - self.log_z_tempered[rows, None]

    def tail(self, rows: slice = slice(None)) -> Tensor:
        """Log of the mass [c] outside the top entries, at that temperature; without meaning unless `bucket`."""
        return self.log_out[rows] - self.log_z_tempered[rows]

    def read(self, z: Tensor, rows: slice, token_ids: Tensor, scratch: Tensor | None) -> None:
        """Read the logits z [c, V] of `rows`. With `bucket`, the top entries of z are set to -inf."""
        n = rows.stop - rows.start
        if scratch is None:
            self.log_z[rows], self.log_z_tempered[rows] = lm_head_kernels.log_z(z[:n], self.temperature)
        else:
            self.log_z[rows] = log_sum_exp_of(z, scratch)[:n]
            self.log_z_tempered[rows] = (
                self.log_z[rows] if self.temperature == 1 else log_sum_exp_of(z, scratch, self.temperature)[:n]
            )
        self.logps[rows] = z[:n].gather(1, token_ids[rows, None])[:, 0] - self.log_z[rows]
        self.at_ids[rows] = z[:n].gather(1, self.targets.ids[rows])
        if self.bucket:
            self._hide_top(z[:n], rows)
            # Where all tokens are top entries, nothing is outside: log_out is any number, and the loss takes LOG_TINY.
            all_top = self.targets.is_top[rows].sum(-1) == z.shape[1]
            log_out = log_sum_exp_of(z, scratch, self.temperature)[:n]
            self.log_out[rows] = torch.where(all_top, self.log_z_tempered[rows], log_out)

    def _hide_top(self, z: Tensor, rows: slice) -> None:
        """Set the top entries of z to -inf. Other slots of `ids` may repeat their ids, which changes nothing."""
        most = torch.where(self.targets.is_top[rows], -torch.inf, torch.inf).to(z.dtype)
        z.scatter_reduce_(1, self.targets.ids[rows], most, "amin")

    def write_gradient(
        self, z: Tensor, rows: slice, token_ids: Tensor, g: Tensor, a: Tensor, b: Tensor, scratch: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The gradient [c, V] of the loss with respect to logits z, as projected or as `read` left them.

        z is overwritten. The result is z itself, or with Triton a new tensor if `dtype` is not that of z. g [c], a
        [c, K] and b [c] are the derivatives by the log-probs of the token and of the stored ids, and by the log mass
        outside the top entries (see `lm_head`)."""
        n, temperature = rows.stop - rows.start, self.temperature
        z, ids = z[:n], self.targets.ids[rows]
        log_z, log_z_tempered, log_out = (x[rows, None] for x in (self.log_z, self.log_z_tempered, self.log_out))
        # Factors of the softmax at temperature 1, and of that at the temperature of the divergence.
        at_one, at_temperature = -g[:, None], -(a.sum(-1) + b)[:, None]
        # p and the share of the mass outside differ by a factor, so one exp gives both. log_out <= log_z_tempered, so
        # nothing overflows, however small the tail is.
        base, scale = (
            (log_out, b[:, None] + at_temperature * (log_out - log_z_tempered).exp())
            if self.bucket
            else (log_z_tempered, at_temperature)
        )
        if temperature == 1:
            scale = scale + at_one * (base - log_z).exp()
        scale = scale / temperature
        dz = z
        if self.bucket:
            self._hide_top(z, rows)
        if scratch is None:
            dz = z if dtype == z.dtype else z.new_empty(z.shape, dtype=dtype)
            columns = (x[:, 0].contiguous() for x in (base, scale, log_z, at_one))  # [c] each
            lm_head_kernels.gradient(z, *columns, temperature=temperature, out=dz)
            if dz is not z:  # z still has the logits; where more is added below, it gets the gradient, in float32
                touched = torch.cat([ids, token_ids[rows, None]], 1)
                logits = z.gather(1, touched)
                plain = 0 if temperature == 1 else at_one * (logits - log_z).exp()
                z.scatter_(1, touched, scale * (logits / temperature - base).exp() + plain)
        else:
            for start in range(0, n, len(scratch)):
                block = slice(start, min(start + len(scratch), n))
                part = z[block]
                if temperature != 1:
                    plain = torch.sub(part, log_z[block], out=scratch[: len(part)]).exp_().mul_(at_one[block])
                    part.div_(temperature)
                part.sub_(base[block]).exp_().mul_(scale[block])
                if temperature != 1:
                    part.add_(plain)
        more = a / temperature
        if self.bucket:  # top entries were hidden, so their gradient is still 0: add the part of p, too
            at_ids = self.at_ids[rows]
            more = (
                more
                + at_temperature / temperature * (at_ids / temperature - log_z_tempered).exp()
                + at_one * (at_ids - log_z).exp()
            )
            more = torch.where(self.targets.is_top[rows], more, 0.0)
        z.scatter_add_(1, ids, more)
        z.scatter_add_(1, token_ids[rows, None], g[:, None])
        if dz is not z:
            dz.scatter_(1, touched, z.gather(1, touched).to(dtype))
        return dz
