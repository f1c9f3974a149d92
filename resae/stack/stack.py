"""The stack: hook points + affine maps + one TopK autoencoder per selected layer, as one object.

    pred_l = Σ_j x_j A_lj + c_l   z_l = TopK_k(relu((x_l − pred_l − b_dec) W_enc + b_enc))
    x̂_l = pred from x̂ so far + z_l W_dec_l + b_dec_l                         ReSAE, arXiv 2605.27819

Open loop: residuals against predictions from the true activations. Closed loop: against predictions
from the reconstructions so far. With predictor "none" these are ordinary SAEs, and the loops agree;
one dictionary shared by all layers is then an MLSAE (arXiv 2409.04185).

On disk: `resae.json`, `affine.safetensors`, and per layer `blocks.{i}.hook_…/{cfg.json,
sae.safetensors}` in sparsify's layout. Everything acts on raw activations: scales used in training
are folded in before saving.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from resae.choices import Loop, PredictorKind
from resae.models.hooked import HookedLM, type_name
from resae.models.identity import ModelIdentity
from resae.models.points import HookPoint
from resae.models.sinks import SinkRule
from resae.sae.base import Autoencoder, SAEConfig
from resae.sae.registry import new_sae
from resae.stack.affine import AffinePredictor
from resae.stack.card import model_card
from resae.stack.files import FILES, StackParts, read_stack, write_stack
from resae.stack.foreign import autoencoders_of
from resae.stack.prepared import Place, PreparedLayer
from resae.strict_json import first_line
from resae_kernels import (
    ScreenedEncoder,
    SparseCode,
    Transported,
    affine_chain,
    online_step,
    transport,
)
from resae_kernels.step import FEW_TOKENS

FEW_ENTRIES = 2048
"""N·D up to which a prediction that reads the map for each token is faster than a call of torch's
product (one core of an Intel Xeon, D = 128 and 768)."""
Activations = Sequence[Tensor] | Mapping[HookPoint, Tensor] | Mapping[str, Tensor]
"""One `[..., D]` per hook point: in the order of the forward pass, or by hook point, as
`HookedLM.capture` returns them, or by its name."""


class StackOutput(NamedTuple):
    """Output of a stack for L activations."""

    x_hats: list[Tensor]
    """L reconstructions `[..., D]`."""
    codes: list[SparseCode]
    """L codes; empty for a stack without autoencoders."""


class ReSAE(nn.Module, ModelHubMixin, library_name="resae", tags=["sparse-autoencoder"]):
    """Autoencoders of several layers of one model, each (but the first) on what the affine maps
    from the layers before it leave.

    Args:
        hook_points: canonical names, in the order of the forward pass.
        predictor: the affine maps; `AffinePredictor("none")` for ordinary SAEs.
        saes: one per hook point; the same one at each for a shared dictionary (MLSAE). Those whose
            layer is predicted become autoencoders of residuals (`SAEConfig.input_kind`).
        model: identity of the model, or None.
        sinks: the rule of sink tokens, which the stack was not trained on and does not replace;
            None: there is none.

    Raises:
        TypeError: something else than hook points, a predictor and autoencoders.
        ValueError: parts that do not fit together.
    """

    def __init__(
        self,
        hook_points: Sequence[str],
        predictor: AffinePredictor,
        saes: Sequence[Autoencoder] = (),
        model: ModelIdentity | None = None,
        sinks: SinkRule | None = None,
    ):
        super().__init__()
        _require_types(hook_points, predictor, saes)
        self._hub_mixin_config = None  # resae.json has everything; the mixin need not write its own
        if len(saes) != len(hook_points):
            raise ValueError(
                f"ReSAE: {len(saes)} autoencoders for {len(hook_points)} hook points; give one each"
            )
        if predictor.kind != "none" and predictor.n_maps != len(hook_points) - 1:
            raise ValueError(
                f"ReSAE: predictor {predictor.kind!r} has {predictor.n_maps} maps for "
                f"{len(hook_points)} hook points; expected {len(hook_points) - 1}"
            )
        self.hook_points = list(hook_points)
        self.predictor = predictor
        first = len(saes) if predictor.kind == "none" else 1  # the first that is predicted
        for name, sae in zip(hook_points, saes[:first], strict=False):
            if sae.config.input_kind != "activation" or sae in saes[first:]:
                raise ValueError(
                    f"ReSAE: the autoencoder of {name} encodes residuals, and predictor "
                    f"{predictor.kind!r} predicts nothing there; give one that encodes activations"
                )
        for sae in saes[first:]:
            sae.set_input_kind("affine_residual")
        if sinks is not None and len(sinks.median_norms) != len(hook_points):
            raise ValueError(
                f"ReSAE: {len(sinks.median_norms)} median norms for {len(hook_points)} hook "
                f"points; give one each"
            )
        self._hold(saes)
        self.model_identity = model
        self.sinks = sinks
        self._prepared: dict[int, PreparedLayer] = {}

    @classmethod
    def from_saes(
        cls,
        saes: Mapping[str | int, Any],
        lm: HookedLM | nn.Module,
        *,
        max_active: int | None = None,
    ) -> "ReSAE":
        """A stack of autoencoders that were trained apart, each on the activations of its layer.

            ReSAE.from_saes({3: "saelens/folder", 7: sparse_coder, 11: "owner/name"}, lm)

        They are replaced together, but nothing is predicted: later autoencoders encode whole
        activations, since that is what they were trained on. Affine maps need autoencoders that
        were trained on residuals: `resae fit --on-reconstructions` and `resae train --first-sae`
        train such ones after the first of these.

        Args:
            saes: hook point → a path or repository that `import_sae` reads, an autoencoder of
                SAELens, sparsify or dictionary_learning, or one of ours. A warning is logged
                where a file or object names another hook point.
            lm: the model, or the Hugging Face model inside.
            max_active: slots of a code, for kinds with a threshold.

        Raises:
            TypeError: an object that is no autoencoder.
            FileNotFoundError, ValueError: as of `import_sae`; unknown hook points, another width
                than the model's, several dtypes, or an autoencoder of residuals.
        """
        lm = lm if isinstance(lm, HookedLM) else HookedLM(lm)
        found = autoencoders_of(saes, lm, max_active)
        predictor = AffinePredictor(PredictorKind.NONE)
        return cls(list(found), predictor, list(found.values()), ModelIdentity.of(lm))

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepared steps, which are of these very tensors: copies make their own."""
        return vars(self) | {"_prepared": {}}

    def extra_repr(self) -> str:
        model = None if self.model_identity is None else self.model_identity.name
        k = [self.sae(i).config.k for i in range(self.n_layers)]
        return (
            f"model={model!r}, hook_points={self.hook_points}, "
            f"predictor={self.predictor.kind!r}, map_type={self.predictor.map_type!r}, "
            f"d_in={self.d_in}, k={k}, shared={self.shared}, boosted={self.boosted}"
        )

    def _repr_html_(self) -> str:
        from resae.stack.notebook import stack_html

        model = "" if self.model_identity is None else f" of {self.model_identity.name}"
        saes = [self.sae(layer) for layer in range(self.n_layers)]
        return stack_html(f"ReSAE{model}", self.hook_points, self.predictor, saes)

    def _hold(self, saes: Sequence[Autoencoder]) -> None:
        distinct = list(dict.fromkeys(saes))
        self.saes = nn.ModuleList(distinct)
        self._sae_of_layer = [distinct.index(sae) for sae in saes]

    @property
    def n_layers(self) -> int:
        """L, how many layers are selected."""
        return len(self.hook_points)

    @property
    def d_in(self) -> int:
        return self.sae(0).config.d_in

    @property
    def d_sae(self) -> int | tuple[int, ...]:
        """Latents of every layer, or of each where they differ."""
        sizes = tuple(self.sae(layer).config.d_sae for layer in range(self.n_layers))
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def sae(self, layer: int) -> Autoencoder:
        """The autoencoder of selected layer `layer` (its position in `hook_points`)."""
        module = self.saes[self._sae_of_layer[layer]]
        assert isinstance(module, Autoencoder)
        return module

    def unique_saes(self) -> list[Autoencoder]:
        """The autoencoders, each once, where `saes` of several layers are one."""
        return [self.sae(self._sae_of_layer.index(i)) for i in range(len(self.saes))]

    def sae_index(self, layer: int) -> int:
        """Index of a layer's autoencoder in `unique_saes()` and `saes`."""
        return self._sae_of_layer[layer]

    @property
    def shared(self) -> bool:
        """True if all layers have one dictionary (MLSAE); biases may differ by a factor each."""
        # Held while they are compared: a boosted autoencoder's W_dec is a copy made at each call.
        dictionaries = [self.sae(layer).W_dec for layer in range(self.n_layers)]
        return self.n_layers > 1 and len({id(W_dec) for W_dec in dictionaries}) == 1

    @property
    def chained(self) -> bool:
        """True if reconstructions depend on those of earlier layers."""
        return self.predictor.kind != "none"

    def upstream_l0(self, layer: int) -> int:
        """Active latents that x̂ of selected layer `layer` is made of: those of all layers whose
        code reaches it through the maps."""
        layers = range(layer + 1) if self.chained else (layer,)
        return sum(self.sae(i).config.k for i in layers)

    @property
    def boosted(self) -> bool:
        """True if every autoencoder is a boosted one: a frozen and a trained one (SAE Boost)."""
        return any(sae.dictionaries > 1 for sae in self.unique_saes())

    def at_k(self, k: int) -> "ReSAE":
        """The same stack, of the same parameters, run with k active latents in every layer; k at
        most what each was trained with. Trained with `TrainConfig.prefixes` it is good at each of
        these (HierarchicalTopK); an ordinary one is merely truncated."""
        saes = [self.sae(layer).at_k(k) for layer in range(self.n_layers)]
        stack = ReSAE(self.hook_points, self.predictor, saes, self.model_identity, self.sinks)
        return stack.train(self.training)

    def encode(self, xs: Activations, *, loop: Loop | str = "open") -> list[SparseCode]:
        """L activations `[..., D]` → L codes `[..., k_l]`; errors as of `forward`."""
        return self(xs, loop=loop).codes

    def decode(self, codes: Sequence[SparseCode]) -> list[Tensor]:
        """L codes → L reconstructions `[..., D]`, back through the chain of maps."""
        if not self.chained:
            return [self.sae(i).decode(*code) for i, code in enumerate(codes)]
        # A cheap map type is there to save dense products; a boosted SAE has two dictionaries.
        if self.predictor.map_type != "full" or self.boosted:
            x_hats: list[Tensor] = []
            for i, code in enumerate(codes):
                x_hats.append(self.sae(i).decode(*code, prediction=self.predictor(i, x_hats)))
            return x_hats
        saes = [self.sae(i) for i in range(self.n_layers)]
        return affine_chain(
            codes,
            [sae.W_dec for sae in saes],
            self.predictor.A,
            self.predictor.c,
            b_dec=[sae.b_dec for sae in saes],
        )

    def forward(self, xs: Activations, *, loop: Loop | str = "open") -> StackOutput:
        """Codes and reconstructions of L activations `[..., D]` of a clean pass.

        Raises:
            TypeError: a single tensor, or something else than tensors.
            ValueError: not one activation per hook point; unknown loop.
        """
        xs = _activations(xs, self.hook_points)
        if _check_loop(loop) == "open" or not self.chained:
            codes = [
                self.sae(i).encode(x, prediction=self.predictor(i, xs)) for i, x in enumerate(xs)
            ]
            return StackOutput(self.decode(codes), codes)
        x_hats: list[Tensor] = []
        codes = []
        for layer, x in enumerate(xs):
            x_hat, code = self.step(layer, x, x_hats, x_hats)
            x_hats.append(x_hat)
            codes.append(code)
        return StackOutput(x_hats, codes)

    def step(
        self,
        layer: int,
        x: Tensor,
        predictor_inputs: Sequence[Tensor],
        reconstructions: Sequence[Tensor],
        *,
        codes: Sequence[SparseCode] = (),
        transported: Transported | None = None,
    ) -> tuple[Tensor, SparseCode]:
        """One layer, online: `(x̂_l, z_l)` of `x [..., D]` given what came before it.

        Closed loop, up to 16 tokens take the fused `online_step`: on a GPU at most four launches,
        on a CPU one call of the compiled library.

        Args:
            predictor_inputs: tensors `[..., D]` of earlier selected layers from which this layer is
                predicted: the reconstructions (closed loop), or the activations that they
                replaced (open).
            reconstructions: the reconstructions of earlier selected layers.
            codes, transported: the codes of all earlier selected layers, and the dictionaries from
                `transported`, by which up to 16 tokens are predicted in place of `reconstructions`;
                on a CPU only for at most D active latents: gathering more rows than a map has
                takes longer.
        """
        prepared = self._prepared.get(layer)
        if (
            prepared is not None
            and predictor_inputs is reconstructions
            and transported is None
            and _is_inference()
        ):
            step = prepared(x, predictor_inputs)
            if step is not None:
                return step
        sae, N = self.sae(layer), x.shape[:-1].numel()
        few = N <= FEW_TOKENS and not torch.is_grad_enabled()
        weights = sae.step_weights if few and predictor_inputs is reconstructions else None
        if weights is not None:
            on_cpu = x.is_cpu and not torch.compiler.is_compiling()
            encoder = sae.screened if sae.screens(x) else None
            by_maps = transported is None or (on_cpu and _maps_are_faster(N, x.shape[-1], codes))
            if encoder is not None and by_maps:
                step = self._step_at_once(layer, x, predictor_inputs, sae, encoder)
                if step is not None:
                    return step
            if not by_maps:
                return online_step(
                    x, *weights, codes=codes, transported=transported, encoder=encoder
                )
            if x.is_cuda:
                prediction = self.predictor(layer, predictor_inputs)
                return online_step(
                    x, *weights, b_dec=sae.b_dec, prediction=prediction, encoder=encoder
                )
        prediction = self.predictor(layer, predictor_inputs)
        code = sae.encode(x, prediction=prediction)
        if predictor_inputs is not reconstructions:
            prediction = self.predictor(layer, reconstructions)
        return sae.decode(*code, prediction=prediction), code

    def _step_at_once(
        self,
        layer: int,
        x: Tensor,
        predictor_inputs: Sequence[Tensor],
        sae: Autoencoder,
        encoder: ScreenedEncoder,
    ) -> tuple[Tensor, SparseCode] | None:
        """`online_step`, prediction included, as one call of the compiled library; None if the
        library does not take these tensors."""
        affine = predict = None
        if layer and self.chained:
            affine = self.predictor.one_map(layer) if x.numel() <= FEW_ENTRIES else None
            predict = partial(self.predictor, layer) if affine is None else itemgetter(layer - 1)
        k, b_dec, W_dec = sae.config.k, sae.b_dec, sae.W_dec
        step = encoder.prepare_step(x, k, b_dec, W_dec, affine, sorted=True)
        if step is None:
            return None
        prepared = PreparedLayer(self._places(layer, sae, predict), step, predict)
        if prepared.is_whole:
            self._prepared[layer] = prepared
        return prepared(x, predictor_inputs)

    def _places(
        self, layer: int, sae: Autoencoder, predict: Callable[..., Tensor] | None
    ) -> list[Place]:
        """Places of the objects that a prepared step of this layer is made of."""
        places: list[Place] = [
            (self._modules, ("saes", "predictor")),
            (self.saes._modules, (str(self.sae_index(layer)),)),
            (vars(sae), ("config", "_screened")),
            (sae._modules, ("encoder",)),
            (sae._parameters, ("W_dec", "b_dec")),
            (sae.get_submodule("encoder")._parameters, ("weight", "bias")),
        ]
        if isinstance(predict, itemgetter):  # the step has the map
            places.append((self.predictor._buffers, (f"A_{layer}", f"c_{layer}")))
        return places

    def transported(
        self, max_bytes: int, *, vectors: Sequence[Tensor] | None = None
    ) -> Transported | None:
        """Every dictionary transported through the maps to every later layer
        (`resae_kernels.transport`), detached; None if the new tables would exceed `max_bytes`,
        there are no maps, or autoencoders are boosted.

        Args:
            vectors: per layer `[V, D]`, vectors that may be added to the stream:
                transported as rows M … M + V − 1 of its tables.
        """
        own = [self.sae(i).W_dec.detach() for i in range(self.n_layers)]
        rows = own
        if vectors is not None:
            rows = [torch.cat([W, u]) if len(u) else W for W, u in zip(own, vectors, strict=True)]
        tables = sum((len(rows) - 1 - i) * W.nbytes for i, W in enumerate(rows))
        if not self.chained or self.boosted or tables > max_bytes:
            return None
        b_dec = [self.sae(i).b_dec for i in range(self.n_layers)]
        transported = transport(rows, self.predictor.A, self.predictor.c, b_dec=b_dec)
        for tables_here, W in zip(transported.dictionaries, own, strict=True):
            tables_here[-1] = W  # without a copy that has the vectors
        return transported

    def require_model(self, lm: HookedLM) -> None:
        """Raise ValueError unless the stack was trained on a model of this architecture and
        size."""
        if self.d_in != lm.d_model:
            raise ValueError(
                f"the stack reconstructs activations of width {self.d_in}, {lm.name} has "
                f"{lm.d_model}: they belong to different models"
            )
        here = ModelIdentity.of(lm)
        trained = self.model_identity
        if trained is None:
            return
        for field in ("model_type", "n_layers", "vocab_size"):
            if getattr(trained, field) != getattr(here, field):
                raise ValueError(
                    f"the stack was trained on {trained.name} ({field} "
                    f"{getattr(trained, field)}), {lm.name} has {field} {getattr(here, field)}: "
                    f"they are different models; load {trained.name}"
                )

    @torch.no_grad()
    def rescale_(self, factors: Sequence[float]) -> None:
        """Become the stack of the activations times `factors`, one per layer."""
        if len(self.saes) < self.n_layers:  # one autoencoder at several layers: biases now differ
            saes = [self.sae(layer) for layer in range(self.n_layers)]
            self._hold([sae.at_k(sae.config.k) for sae in saes])
        for layer, factor in enumerate(factors):
            self.sae(layer).rescale_(factor)
        self.predictor = self.predictor.rescaled(factors)
        self.sinks = self.sinks and self.sinks.rescaled(factors)

    # -- disk and hub ------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        saes = [self.sae(layer) for layer in range(self.n_layers)]
        identity = self.model_identity
        parts = StackParts(self.hook_points, self.predictor, saes, identity, self.sinks)
        write_stack(save_directory, parts, shared=self.shared, boosted=self.boosted)

    def generate_model_card(self, *_arguments: Any, **options: Any) -> ModelCard:
        """The README that `save_pretrained` and `push_to_hub` put beside the weights
        (`resae.stack.card.model_card`, whose options these are)."""
        return model_card(self, **options)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        report: Mapping[str, Any] | None = None,
        license: str | None = None,
        **options: Any,
    ) -> str:
        """Upload weights and a model card to a repository of the hub, which is made where there is
        none.

        Args:
            repo_id: `owner/name`.
            report: the content of `report.json`, for a table of what replacing all layers costs.
            license: of the weights, as the hub names licences; None: the card names none.
            options: those of `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `branch`,
                `commit_message`, `token`, `create_pr`.

        Returns:
            Address of the commit.

        Raises:
            ValueError: a report of other layers, of another model or damaged; before anything is
                uploaded.
            OSError: the hub cannot be reached, or refuses.
        """
        card = {"report": report, "license": license, "repo_id": repo_id}
        self.generate_model_card(**card)
        try:
            return super().push_to_hub(repo_id, model_card_kwargs=card, **options)
        except (OSError, HFValidationError) as error:
            raise OSError(
                f"stack: cannot be uploaded to {repo_id!r} "
                f"({first_line(error)}); give owner/name of a repository that "
                f"you may write, and log in with `hf auth login`"
            ) from None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "ReSAE":  # type: ignore[override]
        """Open a local folder, or a repository of the hub.

        Args:
            options: for a repository, those of `huggingface_hub.snapshot_download`: `revision`
                (branch, tag or commit), `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            FileNotFoundError: neither such a folder nor such a repository, or a file is missing.
            ValueError: a file is damaged or of an unknown format.
        """
        name = str(pretrained_model_name_or_path)
        if name and Path(name).is_dir():
            return cls.load(name)
        try:
            folder = snapshot_download(name, allow_patterns=FILES, **options)
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"stack {name!r}: there is no such folder, and no repository of that name could be "
                f"read from the hub ({first_line(error)}); give a folder written "
                f"by `resae train` or `save_pretrained`, or a repository, owner/name"
            ) from None
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "ReSAE":
        """Read a local folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: not such a folder, or a file of it is missing.
            ValueError: a file is damaged or of an unknown format.
        """
        return cls(*read_stack(Path(folder))).eval()


def new_stack(
    hook_points: Sequence[str],
    predictor: AffinePredictor,
    *,
    d_in: int,
    d_sae: int | Sequence[int],
    k: Sequence[int],
    seed: int = 0,
    shared: bool = False,
    prefixes: Sequence[int] | None = None,
    prefix_gain: float = 0.0,
    model: ModelIdentity | None = None,
) -> ReSAE:
    """An untrained stack; every layer starts from its own random directions, or all are one.

    Args:
        d_sae: latents, for every layer or one number per layer.
        prefixes: numbers of latents that are trained at once (`PrefixSAE`).
    """
    d_saes = [d_sae] * len(k) if isinstance(d_sae, int) else d_sae
    sizes = list(zip(d_saes, k, strict=True))
    saes = [
        new_sae(SAEConfig(d_in, M, k_l, prefix_gain), seed=seed * 1_000 + layer, prefixes=prefixes)
        for layer, (M, k_l) in enumerate(sizes[:1] if shared else sizes)
    ]
    return ReSAE(hook_points, predictor, saes * len(k) if shared else saes, model)


class AffineOnly:
    """The baseline without autoencoders: the first selected layer as it is, the rest from the maps.

    Has of `ReSAE` what replacement and evaluation use.
    """

    def __init__(self, stack: ReSAE):
        if not isinstance(stack, ReSAE):
            raise TypeError(f"AffineOnly: got {type_name(stack)}, expected a ReSAE")
        self.hook_points = stack.hook_points
        self.predictor = stack.predictor
        self.sinks = stack.sinks
        self.n_layers = stack.n_layers
        self.require_model = stack.require_model

    def upstream_l0(self, layer: int) -> int:  # noqa: ARG002
        return 0

    def __call__(self, xs: Activations, *, loop: Loop | str = "open") -> StackOutput:  # noqa: ARG002
        xs = _activations(xs, self.hook_points)
        x_hats: list[Tensor] = []
        for layer, x in enumerate(xs):
            x_hats.append(self.step(layer, x, x_hats, x_hats)[0])
        return StackOutput(x_hats, [])

    def step(
        self,
        layer: int,
        x: Tensor,
        predictor_inputs: Sequence[Tensor],  # noqa: ARG002
        reconstructions: Sequence[Tensor],
    ) -> tuple[Tensor, None]:
        prediction = self.predictor(layer, reconstructions)
        return x if prediction is None else prediction, None


def _is_inference() -> bool:
    """Is no gradient wanted, and nothing traced?"""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _maps_are_faster(N: int, D: int, codes: Sequence[SparseCode]) -> bool:
    """Than gathering the transported rows of N tokens, on a CPU: the maps are read once for all of
    them."""
    return N * sum(code.acts.shape[-1] for code in codes) > D


def _require_types(hook_points: Any, predictor: Any, saes: Any) -> None:
    if isinstance(hook_points, str) or not all(isinstance(name, str) for name in hook_points):
        raise TypeError(
            f"ReSAE: got {hook_points!r} as hook points, expected a list of names such as "
            f"'blocks.1.hook_resid_post' (HookPoint.name)"
        )
    if not isinstance(predictor, AffinePredictor):
        raise TypeError(
            f"ReSAE: got {type_name(predictor)} as the predictor, expected an AffinePredictor; for "
            f"ordinary autoencoders ReSAE(hook_points, AffinePredictor('none'), saes)"
        )
    for sae in saes:
        if not isinstance(sae, Autoencoder):
            raise TypeError(
                f"ReSAE: got {type_name(sae)} as an autoencoder, expected a TopKSAE or BoostedSAE; "
                f"TopKSAE.load(folder) reads what sparsify saves"
            )


def _activations(xs: Activations, hook_points: Sequence[str]) -> list[Tensor]:
    """One activation per hook point, in their order."""
    if isinstance(xs, Mapping):
        named = {str(getattr(point, "name", point)): x for point, x in xs.items()}
        missing = [name for name in hook_points if name not in named]
        if missing:
            raise ValueError(
                f"ReSAE: no activation of {', '.join(missing)}, only of {', '.join(named)}; "
                f"capture all of lm.hook_points(stack.hook_points)"
            )
        xs = [named[name] for name in hook_points]
    if not isinstance(xs, Iterable) or isinstance(xs, Tensor):
        raise TypeError(
            f"ReSAE: got {type_name(xs)}, expected a list of one tensor [..., D] per hook point, "
            f"or what HookedLM.capture returns"
        )
    xs = list(xs)
    for x in xs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"ReSAE: got {type_name(x)} as an activation, expected a tensor [..., D]"
            )
    if len(xs) != len(hook_points):
        raise ValueError(f"ReSAE: got {len(xs)} activations, expected {len(hook_points)}")
    return xs


def _check_loop(loop: str) -> str:
    if loop not in ("open", "closed"):  # as torch.compile reads it
        Loop.check(loop, "loop")
    return loop
