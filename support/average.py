# SPDX-License-Identifier: MIT
"""Exponential moving average of a network's weights, which is evaluated in the place of the last weights.

    average = decay * average + (1 - decay) * weights                after each step

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992. Buffers, running
statistics say, are not averaged.

Imports torch.
"""
import contextlib

import torch


class MovingAverage:
    """The average of the trained weights of a model. decay: 0: there is none, and all methods do nothing.

    At step t the decay is at most (1 + t) / (10 + t), so that the initial weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {}
        if decay:
            self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step):
        """Takes in the weights after step `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Within this context the model has the average as its weights."""
        last = {name: p.detach().clone() for name, p in self.weights.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(last)

    @torch.no_grad()
    def _set(self, values):
        for name, parameter in self.weights.items():
            parameter.copy_(values[name])

    def state_dict(self):
        """{name of a weight: average}."""
        return dict(self.average)

    def load_state_dict(self, state):
        """Goes on from a `state_dict`; weights that are not in it keep the average that they have."""
        for name in self.average.keys() & state.keys():
            self.average[name].copy_(state[name])
