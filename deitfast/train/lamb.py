"""LAMB (You et al., 2020): Adam's update, scaled for each tensor to the size of the tensor."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lamb(Optimizer):
    """LAMB as NVIDIA's and timm's: weight decay joins Adam's update, and what is decayed is scaled by a trust ratio.

    Of a tensor p with Adam's bias-corrected update u and weight decay d: p -= lr r (u + d p), where the trust ratio r
    is |p| / |u + d p|, or 1 where either is zero. What is not decayed (biases, norms, positions, tokens) has r = 1.
    timm's also clips the gradient to a norm of 1, which here is `optim.clip`.

    Each parameter's state is "exp_avg", "exp_avg_sq" and "step" (on the CPU); the host waits for nothing.
    """

    def __init__(self, params: list[dict[str, object]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def _update(
        self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        grads = [parameter.grad for parameter in params]
        states = [self._state_of(parameter) for parameter in params]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(first, grads, 1 - betas[0])  # pyright: ignore
        torch._foreach_mul_(second, betas[1])  # pyright: ignore
        torch._foreach_addcmul_(second, grads, grads, 1 - betas[1])  # pyright: ignore
        steps = [int(state["step"]) for state in states]
        roots = torch._foreach_sqrt(second)  # pyright: ignore
        torch._foreach_div_(roots, [(1 - betas[1] ** step) ** 0.5 for step in steps])  # pyright: ignore
        torch._foreach_add_(roots, eps)  # pyright: ignore
        updates = torch._foreach_div(first, [1 - betas[0] ** step for step in steps])  # pyright: ignore
        torch._foreach_div_(updates, roots)  # pyright: ignore
        if decay:
            torch._foreach_add_(updates, params, alpha=decay)  # pyright: ignore
            torch._foreach_mul_(updates, _trust_ratios(params, updates))  # pyright: ignore
        torch._foreach_add_(params, updates, alpha=-lr)  # pyright: ignore

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state["step"] = torch.zeros(())
        state["step"] += 1
        return state


def _trust_ratios(params: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """Return |p| / |u| of each pair, a scalar on the device, 1 where either is zero."""
    sizes, changes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, updates))  # pyright: ignore
    ratios = torch.where((sizes > 0) & (changes > 0), sizes / changes, 1.0)
    return list(ratios.unbind())
