"""Switching a model's memory off, to see what it is worth."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from moshi.models.lm import LMModel

from moshi_ttt.carried import CarriedLayer, CarriedState
from moshi_ttt.integration import set_attention_context, temporal_attentions, ttt_layers
from moshi_ttt.ttt_layer import TTTBase


def inner_learners(model: LMModel) -> dict[int, TTTBase]:
    """The TTT layers, by index of their temporal layer."""
    return {index: layer.seq_modeling_block.ttt_layer.ttt for index, layer in ttt_layers(model)}


def mini_batch_frames(model: LMModel) -> int:
    """Frames after which all TTT layers begin a mini-batch; 1 without TTT layers."""
    return math.lcm(*(ttt.mini_batch_size for ttt in inner_learners(model).values()))


@contextmanager
def inner_lr_0(model: LMModel) -> Iterator[None]:
    """Inner learning rate 0: the TTT layers answer with their learned weights, always."""
    learners = inner_learners(model).values()
    rates = [ttt.base_lr for ttt in learners]
    for ttt in learners:
        ttt.base_lr = 0.0
    try:
        yield
    finally:
        for ttt, rate in zip(learners, rates, strict=True):
            ttt.base_lr = rate


@contextmanager
def gate_off(model: LMModel) -> Iterator[None]:
    """The TTT layers' outputs weigh nothing; with a convex gate, attention's weigh all."""
    alphas = [
        (layer.seq_modeling_block.gate, layer.seq_modeling_block.gate.alpha) for _, layer in ttt_layers(model)
    ]
    saved = [alpha.detach().clone() for _, alpha in alphas]
    with torch.no_grad():
        for gate, alpha in alphas:
            alpha.fill_(gate.off)
    try:
        yield
    finally:
        with torch.no_grad():
            for (_, alpha), value in zip(alphas, saved, strict=True):
                alpha.copy_(value)


@contextmanager
def attention_contexts(model: LMModel, ttt_layer: int | None, non_ttt_layer: int | None) -> Iterator[None]:
    """Other attention windows, in frames; None leaves a kind of layers as it is."""
    attentions = [attention for _, _, attention in temporal_attentions(model)]
    saved = [attention.context for attention in attentions]
    set_attention_context(model, ttt_layer, non_ttt_layer)
    try:
        yield
    finally:
        for attention, context in zip(attentions, saved, strict=True):
            attention.context = context


def without_inner_memory(model: LMModel, carried: CarriedState) -> CarriedState:
    """The state with the learned inner weights; attention's keys and values, codes and positions stay."""
    rows = carried.position.shape[0]
    learners = inner_learners(model)

    def reset(index: int, layer: CarriedLayer) -> CarriedLayer:
        if index not in learners:
            return layer
        return replace(layer, inner=learners[index].initial_weights(rows).detach())

    return replace(carried, layers=tuple(reset(i, layer) for i, layer in enumerate(carried.layers)))
