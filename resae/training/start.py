"""The state before the first step, of one process or of the share of one rank."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from resae.models.identity import ModelIdentity
from resae.sae.base import Autoencoder, SAEConfig
from resae.sae.boosted import BoostedSAE
from resae.sae.registry import load_sae
from resae.sae.topk import TopKSAE
from resae.stack.affine import AffinePredictor
from resae.stack.stack import ReSAE, new_stack
from resae.training.calibration import Calibration
from resae.training.config import TrainConfig
from resae.training.distributed import Ranks
from resae.training.step import TrainState


def initial_state(
    config: TrainConfig, calibration: Calibration, identity: ModelIdentity | None, device: str
) -> TrainState:
    """Step 0: random directions, `b_dec` the mean of what each autoencoder reads.

    Raises:
        FileNotFoundError, ValueError: there is no stack to boost or first autoencoder to keep, or
            not one of this configuration.
    """
    stack = (
        _boosted(config, calibration) if config.boost else _random(config, calibration, identity)
    )
    stack.to(device)
    return TrainState(stack, _optimizer(stack), idle_tokens(stack))


def idle_tokens(stack: ReSAE) -> list[torch.Tensor]:
    """Counters of tokens since each latent fired, at 0: `[M]` of each of `stack.saes`."""
    saes = [sae if sae.is_frozen else sae.trainable for sae in stack.unique_saes()]
    return [sae.b_dec.new_zeros(sae.config.d_sae, dtype=torch.int64) for sae in saes]


def _optimizer(stack: ReSAE) -> torch.optim.Optimizer:
    """Adam with one parameter group per layer, or one for all layers that share a dictionary; a
    step sets the learning rates."""
    groups = [
        {
            "params": [p for p in sae.parameters() if p.requires_grad],
            "layer": layer,
            "lr_factor": 1.0,
        }
        for layer, sae in enumerate(stack.unique_saes())
    ]
    return torch.optim.Adam(groups, fused=True)


def state_of_rank(
    state: TrainState, config: TrainConfig, ranks: Ranks, device: str
) -> tuple[TrainState, TrainConfig]:
    """Training state and settings of one rank. By layers: ordinary autoencoders of its layers,
    trained on the residuals of the maps."""
    ranks.broadcast_(state.stack.state_dict().values())
    own = ranks.local_layers(len(config.layers))
    if not ranks.by_layers:
        return state, config
    saes = []
    for layer in own:
        sae = state.stack.sae(layer)
        tensors = (*sae.parameters(), *sae.buffers())
        sae = copy.deepcopy(sae, {id(tensor): tensor for tensor in tensors})  # of the same tensors
        sae.set_input_kind("activation")
        saes.append(sae)
    names = tuple(config.layers[layer] for layer in own)
    part = ReSAE(names, AffinePredictor("none"), saes).to(device)
    idle = [state.tokens_since_fired[layer].to(device) for layer in own]
    sizes = {
        "k": tuple(config.k[layer] for layer in own),
        "d_sae": tuple(config.d_saes[layer] for layer in own),
    }
    alone = {"predictor": "none", "map_type": "full", "rank": None, "loop": "open"}
    config = replace(config, layers=names, **sizes, **alone)
    return TrainState(part, _optimizer(part), idle), config


def require_divisible(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError unless this number of ranks can share this training."""
    problem = None
    if config.batch_tokens % ranks.size:
        problem = f"batch_tokens={config.batch_tokens}; make it a multiple of the ranks"
    elif ranks.by_layers and config.loop == "closed" and config.predictor != "none":
        problem = "--parallel layers with loop='closed', where a layer waits for the one before; "
        problem += "use --parallel data"
    elif ranks.by_layers and config.first_sae is not None:
        problem = "--parallel layers with --first-sae, which is not trained; use --parallel data"
    elif ranks.by_layers and config.shared:
        problem = "--parallel layers with a shared dictionary; use --parallel data"
    elif ranks.by_layers and ranks.size > len(config.layers):
        problem = f"--parallel layers with {len(config.layers)} layers; start at most as many ranks"
    if problem is not None:
        raise ValueError(f"train: {ranks.size} ranks and {problem}")


def _random(config: TrainConfig, calibration: Calibration, identity: ModelIdentity | None) -> ReSAE:
    inverse = [1.0 / s for s in calibration.scale]
    stack = new_stack(
        config.layers,
        calibration.predictor.rescaled(inverse),
        d_in=len(calibration.mean[0]),
        d_sae=config.d_saes,
        k=config.k,
        seed=config.seed,
        shared=config.shared,
        prefixes=config.prefixes,
        prefix_gain=config.prefix_gain if config.prefixes else 0.0,
        model=identity,
    )
    if config.first_sae is not None:
        first = kept_first(config, stack.d_in).float().requires_grad_(False)
        _require_powers_of_two(calibration.scale[:1])
        first.rescale_(inverse[0])
        later = [stack.sae(layer) for layer in range(1, stack.n_layers)]
        stack = ReSAE(stack.hook_points, stack.predictor, [first, *later], identity)
    means = [mean * factor for mean, factor in zip(calibration.mean, inverse, strict=True)]
    if config.shared:
        means = [torch.stack(means).mean(0)] * len(means)
    for layer, mean in enumerate(means):
        # Of a residual the mean is zero by construction.
        if (layer == 0 or not stack.chained) and not stack.sae(layer).is_frozen:
            stack.sae(layer).b_dec.data.copy_(mean)
    return stack


def kept_first(config: TrainConfig, d_in: int) -> Autoencoder:
    """The autoencoder of `config.first_sae`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it encodes residuals, is of another width, or of other sizes than `config`'s.
    """
    folder = str(config.first_sae)
    sae = load_sae(folder)
    has = sae.config
    if has.input_kind != "activation":
        raise ValueError(
            f"--first-sae: {folder} encodes residuals of a prediction, and nothing predicts the "
            f"first layer; give one that encodes activations"
        )
    if has.d_in != d_in:
        raise ValueError(f"--first-sae: {folder} has width {has.d_in}, the stream has {d_in}")
    asked = (config.k[0], config.d_saes[0])
    if (has.k, has.d_sae) != asked:
        raise ValueError(
            f"--first-sae: {folder} has k={has.k} and {has.d_sae} latents, the first layer has "
            f"k={asked[0]} and {asked[1]}; give --k-per-layer {has.k},… and --d-sae {has.d_sae},…"
        )
    return sae


def _require_powers_of_two(scales: Sequence[float]) -> None:
    if any(math.frexp(s)[0] != 0.5 for s in scales):
        raise ValueError(
            f"training: scales {scales} are no powers of two, so that weights that are kept would "
            f"not keep their bits; take them from Calibration.keeping_first or boost_calibration"
        )


def _boosted(config: TrainConfig, calibration: Calibration) -> ReSAE:
    base_stack = ReSAE.load(str(config.boost))
    has = (tuple(base_stack.hook_points), base_stack.predictor.kind, base_stack.predictor.map_type)
    asked = (config.layers, config.predictor, config.map_type)
    if has != asked or base_stack.boosted:
        boosted = ", boosted already" if base_stack.boosted else ""
        raise ValueError(
            f"boost: {config.boost} has layers, predictor and map type {has}{boosted}; "
            f"expected {asked}"
        )
    _require_powers_of_two(calibration.scale)
    base_stack.rescale_([1.0 / s for s in calibration.scale])
    saes = []
    for layer, (d_sae, k) in enumerate(zip(config.d_saes, config.k, strict=True)):
        # Other directions than the base began with.
        seed = config.seed * 1_000 + 500 + layer
        boost = TopKSAE(SAEConfig(base_stack.d_in, d_sae, k), seed=seed)
        saes.append(BoostedSAE(base_stack.sae(layer), boost, keep=config.boost_keep))
    return ReSAE(base_stack.hook_points, base_stack.predictor, saes, base_stack.model_identity)
