"""Routers: small classifiers trained to send a prompt to the expert of its domain, as the paper's baseline.

Multinomial logistic regression, on counts of hashed character n-grams or on the target's final hidden states.
"""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from nab.backends.pretrained import Pretrained
from nab.types import Floats

BUCKETS = 2048
PENALTY = 1e-3


def ngrams(texts: Sequence[str]) -> Floats:
    """Square roots of counts of character 1- to 3-grams, hashed; each row of length 1."""
    counts = np.zeros((len(texts), BUCKETS))
    for row, text in zip(counts, texts, strict=True):
        for size in (1, 2, 3):
            grams = (text[k : k + size] for k in range(len(text) - size + 1))
            np.add.at(row, [crc32(gram.encode()) % BUCKETS for gram in grams], 1)
    found = np.sqrt(counts)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


@torch.inference_mode()
def states(target: Pretrained, texts: Sequence[str]) -> dict[str, Floats]:
    """Final hidden states: the mean over a prompt's tokens, and that of its last token."""
    found = []
    for text in texts:
        ids = torch.tensor([target.encode(text)], device=target.model.device)
        found.append(target.model(ids, output_hidden_states=True).hidden_states[-1][0].double().cpu())
    return {
        "mean state": torch.stack([each.mean(0) for each in found]).numpy(),
        "last state": torch.stack([each[-1] for each in found]).numpy(),
    }


def features(target: Pretrained, texts: Sequence[str]) -> dict[str, Floats]:
    """What each router reads of prompts, ``(prompts, features)`` by the router's name."""
    return {"n-grams": ngrams(texts), **states(target, texts)}


class Router(NamedTuple):
    """Logistic regression on features of mean 0 and variance 1.

    Args:
        labels: c of them.
        mean, spread: of the features it was trained on, ``(features,)``.
        weights: ``(features + 1, c)``, the last row for a constant.
    """

    labels: list[str]
    mean: Floats
    spread: Floats
    weights: Floats

    def route(self, features: Floats) -> list[str]:
        """The likeliest label of each row."""
        return [self.labels[k] for k in (_scaled(features, self.mean, self.spread) @ self.weights).argmax(1)]


def _scaled(features: Floats, mean: Floats, spread: Floats) -> Floats:
    return np.concatenate([(features - mean) / spread, np.ones((len(features), 1))], 1)


def fit(features: Floats, names: Sequence[str]) -> Router:
    """Least mean log loss, plus half of ``PENALTY`` times the sum of the squared weights; L-BFGS from 0.

    Args:
        features: ``(prompts, features)``.
        names: the prompts' labels.
    """
    labels = sorted(set(names))
    mean, spread = features.mean(0), features.std(0)
    spread[spread == 0] = 1
    rows = _scaled(features, mean, spread)
    hot = np.eye(len(labels))[[labels.index(name) for name in names]]

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(rows.shape[1], -1)
        logits = rows @ weights
        value = -(hot * log_softmax(logits, 1)).sum() / len(rows) + PENALTY / 2 * (flat @ flat)
        slope = rows.T @ (softmax(logits, 1) - hot) / len(rows) + PENALTY * weights
        return value, slope.ravel()

    found = minimize(loss, np.zeros(rows.shape[1] * len(labels)), jac=True, method="L-BFGS-B")
    return Router(labels, mean, spread, found.x.reshape(rows.shape[1], -1))
