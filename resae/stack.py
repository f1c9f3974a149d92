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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import Tensor, nn

from resae.affine import KINDS, AffinePredictor
from resae.model import HookedLM
from resae.sae import BoostedSAE, SAEConfig, TopKSAE
from resae.storage import load_json, save_json
from resae_kernels import TopK, Transported, affine_chain, online_step, transport
from resae_kernels.online_step import FEW_TOKENS

FORMAT_VERSION = 1
Loop = Literal["open", "closed"]


@dataclass(frozen=True)
class ModelIdentity:
    """What a stack remembers of the model that it was trained on."""

    name: str
    model_type: str
    d_model: int
    n_layers: int
    vocab_size: int

    @classmethod
    def of(cls, lm: HookedLM) -> "ModelIdentity":
        return cls(
            lm.name, lm.config.model_type, lm.d_model, lm.n_layers, int(lm.config.vocab_size)
        )


class StackOutput(NamedTuple):
    """What a stack makes of L activations."""

    x_hats: list[Tensor]
    """L reconstructions `[..., D]`."""
    codes: list[TopK]
    """L codes; empty for a stack without autoencoders."""


class ReSAE(
    nn.Module,
    ModelHubMixin,
    library_name="resae",
    license="apache-2.0",
    tags=["sparse-autoencoder"],
):
    """Autoencoders of several layers of one model, each (but the first) on what the affine maps
    from the layers before it leave.

    Args:
        hook_points: canonical names, in the order of the forward pass.
        predictor: the affine maps; `AffinePredictor("none")` for ordinary SAEs.
        saes: one per hook point; the same one at each for a shared dictionary (MLSAE).
        model: identity of the model, or None.
    """

    def __init__(
        self,
        hook_points: Sequence[str],
        predictor: AffinePredictor,
        saes: Sequence[TopKSAE | BoostedSAE],
        model: ModelIdentity | None = None,
    ):
        super().__init__()
        self._hub_mixin_config = (
            None  # resae.json says everything; the mixin need not write its own
        )
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
        self._hold(saes)
        self.model_identity = model

    def _hold(self, saes: Sequence[TopKSAE | BoostedSAE]) -> None:
        distinct = list(dict.fromkeys(saes))
        self.saes = nn.ModuleList(distinct)
        self._of_layer = [distinct.index(sae) for sae in saes]

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

    def sae(self, layer: int) -> TopKSAE | BoostedSAE:
        """The autoencoder of selected layer `layer` (its position in `hook_points`)."""
        module = self.saes[self._of_layer[layer]]
        assert isinstance(module, TopKSAE | BoostedSAE)
        return module

    def distinct(self) -> list[TopKSAE | BoostedSAE]:
        """The autoencoders, each once, where `saes` of several layers are one."""
        return [self.sae(self._of_layer.index(i)) for i in range(len(self.saes))]

    def position(self, layer: int) -> int:
        """Where in `distinct()` and `saes` the autoencoder of a layer is."""
        return self._of_layer[layer]

    @property
    def shared(self) -> bool:
        """Whether all layers have one dictionary (MLSAE); biases may differ by a factor each."""
        dictionaries = {id(self.sae(layer).W_dec) for layer in range(self.n_layers)}
        return self.n_layers > 1 and len(dictionaries) == 1

    @property
    def chained(self) -> bool:
        """Whether reconstructions depend on those of earlier layers."""
        return self.predictor.kind != "none"

    def active_total(self, layer: int) -> int:
        """Active latents that x̂ of selected layer `layer` is made of: those of all layers whose
        code reaches it through the maps."""
        layers = range(layer + 1) if self.chained else (layer,)
        return sum(self.sae(i).config.k for i in layers)

    @property
    def boosted(self) -> bool:
        """Whether autoencoders have a second one beside them (SAE Boost)."""
        return any(isinstance(sae, BoostedSAE) for sae in self.saes)

    def at_k(self, k: int) -> "ReSAE":
        """The same stack, of the same parameters, run with k active latents in every layer; k at
        most what each was trained with. Trained with `TrainConfig.prefixes` it is good at each of
        these (HierarchicalTopK); an ordinary one is merely truncated."""
        saes = [self.sae(layer).at_k(k) for layer in range(self.n_layers)]
        stack = ReSAE(self.hook_points, self.predictor, saes, self.model_identity)
        return stack.train(self.training)

    def encode(self, xs: Sequence[Tensor], *, loop: Loop = "open") -> list[TopK]:
        """L activations `[..., D]` → L codes `[..., k_l]`."""
        return self(xs, loop=loop).codes

    def decode(self, codes: Sequence[TopK]) -> list[Tensor]:
        """L codes → L reconstructions `[..., D]`, back through the chain of maps."""
        if not self.chained:
            return [self.sae(i).decode(*code) for i, code in enumerate(codes)]
        # Dense products are what a cheap form saves, one dictionary what a boosted SAE has not.
        if self.predictor.form != "full" or self.boosted:
            x_hats: list[Tensor] = []
            for i, code in enumerate(codes):
                x_hats.append(self.sae(i).decode(*code, base=self.predictor(i, x_hats)))
            return x_hats
        saes = [self.sae(i) for i in range(self.n_layers)]
        return affine_chain(
            codes,
            [sae.W_dec for sae in saes],
            self.predictor.A,
            self.predictor.c,
            b_dec=[sae.b_dec for sae in saes],
        )

    def forward(self, xs: Sequence[Tensor], *, loop: Loop = "open") -> StackOutput:
        """Codes and reconstructions of L activations `[..., D]` of a clean pass."""
        if len(xs) != self.n_layers:
            raise ValueError(f"ReSAE: got {len(xs)} activations, expected {self.n_layers}")
        if _check_loop(loop) == "open" or not self.chained:
            codes = [self.sae(i).encode(x, base=self.predictor(i, xs)) for i, x in enumerate(xs)]
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
        seen: Sequence[Tensor],
        put_in: Sequence[Tensor],
        *,
        codes: Sequence[TopK] = (),
        carried: Transported | None = None,
    ) -> tuple[Tensor, TopK]:
        """One layer, online: `(x̂_l, z_l)` of `x [..., D]` given what came before it.

        On a GPU, closed loop, up to 16 tokens take the fused `online_step`: at most three launches.

        Args:
            seen: the activations `[..., D]` of earlier selected layers that the residual is taken
                against: the reconstructions (closed loop), or the activations they replaced (open).
            put_in: the reconstructions of earlier selected layers.
            codes, carried: the codes of all earlier selected layers, and the dictionaries from
                `transported`, by which up to 16 tokens are predicted in place of `put_in`.
        """
        sae = self.sae(layer)
        few = x.shape[:-1].numel() <= FEW_TOKENS and not torch.is_grad_enabled()
        fused = few and seen is put_in and (carried is not None or x.is_cuda)
        if fused and isinstance(sae, TopKSAE):  # a boosted one is two encodes
            weights = (sae.encoder.weight, sae.encoder.bias, sae.config.k, sae.W_dec)
            if carried is not None:
                return online_step(x, *weights, codes=codes, transported=carried)
            base = self.predictor(layer, seen)
            return online_step(x, *weights, b_dec=sae.b_dec, base=base)
        base = self.predictor(layer, seen)
        code = sae.encode(x, base=base)
        if seen is not put_in:
            base = self.predictor(layer, put_in)
        return sae.decode(*code, base=base), code

    def transported(
        self, max_bytes: int, *, vectors: Sequence[Tensor] | None = None
    ) -> Transported | None:
        """Every dictionary carried through the maps to every later layer
        (`resae_kernels.transport`), detached; None if the new tables would exceed `max_bytes`,
        there are no maps, or autoencoders are boosted.

        Args:
            vectors: per layer `[V, D]`, what may be added to the stream beside its latents: carried
                as rows M … M + V − 1 of its tables.
        """
        own = [self.sae(i).W_dec.detach() for i in range(self.n_layers)]
        rows = own
        if vectors is not None:
            rows = [torch.cat([W, u]) if len(u) else W for W, u in zip(own, vectors, strict=True)]
        tables = sum((len(rows) - 1 - i) * W.nbytes for i, W in enumerate(rows))
        if not self.chained or self.boosted or tables > max_bytes:
            return None
        b_dec = [self.sae(i).b_dec for i in range(self.n_layers)]
        carried = transport(rows, self.predictor.A, self.predictor.c, b_dec=b_dec)
        for tables_here, W in zip(carried.dictionaries, own, strict=True):
            tables_here[-1] = W  # without a copy that has the vectors
        return carried

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

    # -- disk and hub ------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        # A folder with resae.json is complete: it goes first and comes last.
        (save_directory / "resae.json").unlink(missing_ok=True)
        for layer, name in enumerate(self.hook_points):
            predicted = self.chained and layer > 0
            self.sae(layer).save(
                save_directory / name,
                hook_point=name,
                input_kind="affine_residual" if predicted else "activation",
            )
        self.predictor.save(save_directory / "affine.safetensors")
        save_json(
            save_directory / "resae.json",
            {
                "format_version": FORMAT_VERSION,
                "hook_points": self.hook_points,
                "predictor": self.predictor.kind,
                "form": self.predictor.form,
                "shared": self.shared,
                "boosted": self.boosted,
                "d_in": self.d_in,
                "d_sae": [self.sae(i).config.d_sae for i in range(self.n_layers)],
                "k": [self.sae(i).config.k for i in range(self.n_layers)],
                "model": None if self.model_identity is None else asdict(self.model_identity),
            },
        )

    def generate_model_card(self, *_arguments: Any, **_options: Any) -> ModelCard:
        """The README that `save_pretrained` and `push_to_hub` put beside the weights."""
        identity = self.model_identity
        model = "an unnamed model" if identity is None else identity.name
        k = ", ".join(str(self.sae(i).config.k) for i in range(self.n_layers))
        header = ModelCardData(library_name="resae", license="apache-2.0").to_yaml()
        return ModelCard(
            f"---\n{header}\n---\n\n# TopK autoencoders of {self.n_layers} layers of {model}\n\n"
            f"Layers {', '.join(self.hook_points)}; {self.d_sae} latents per layer, "
            f"k = {k}; affine predictor `{self.predictor.kind}`, {self.predictor.form} (ReSAE, "
            "arXiv 2605.27819).\n\n"
            "```python\nfrom resae import ReSAE\n\n"
            'stack = ReSAE.from_pretrained("<this repository>")\n```\n'
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "ReSAE":  # type: ignore[override]
        """Open a local folder, or a repository of the hub (`revision`, `token`, `cache_dir`, …)."""
        if Path(pretrained_model_name_or_path).is_dir():
            return cls.load(pretrained_model_name_or_path)
        return super().from_pretrained(str(pretrained_model_name_or_path), **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_options: Any,
    ) -> "ReSAE":
        return cls.load(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=["*.json", "*.safetensors"],
            )
        )

    @classmethod
    def load(cls, folder: str | Path) -> "ReSAE":
        """Read a local folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: not such a folder, or a file of it is missing.
            ValueError: a file is damaged or of an unknown format.
        """
        folder = Path(folder)
        description = load_json(folder / "resae.json", "stack")
        if description.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"stack {folder}: format_version {description.get('format_version')}, this resae "
                f"reads {FORMAT_VERSION}; update resae"
            )
        if description["predictor"] not in KINDS:
            raise ValueError(f"stack {folder}: unknown predictor {description['predictor']!r}")
        folders = [folder / name for name in description["hook_points"]]
        saes: Sequence[TopKSAE | BoostedSAE]
        if description.get("boosted", False):
            saes = [BoostedSAE.load(path) for path in folders]
        else:
            saes = plain = [TopKSAE.load(path) for path in folders]
            if description.get("shared", False):
                _share(plain, folder)
        stack = cls(
            description["hook_points"],
            AffinePredictor.load(folder / "affine.safetensors", description["predictor"]),
            saes,
            description["model"] and ModelIdentity(**description["model"]),
        )
        return stack.eval()


def new_stack(
    hook_points: Sequence[str],
    predictor: AffinePredictor,
    *,
    d_in: int,
    d_sae: int | Sequence[int],
    k: Sequence[int],
    seed: int = 0,
    shared: bool = False,
    prefix_gain: float = 0.0,
    model: ModelIdentity | None = None,
) -> ReSAE:
    """An untrained stack; every layer starts from its own random directions, or all are one.

    Args:
        d_sae: latents, for every layer or one number per layer.
    """
    d_saes = [d_sae] * len(k) if isinstance(d_sae, int) else d_sae
    sizes = list(zip(d_saes, k, strict=True))
    saes = [
        TopKSAE(SAEConfig(d_in, M, k_l, prefix_gain), seed=seed * 1_000 + layer)
        for layer, (M, k_l) in enumerate(sizes[:1] if shared else sizes)
    ]
    return ReSAE(hook_points, predictor, saes * len(k) if shared else saes, model)


def _share(saes: Sequence[TopKSAE], folder: Path) -> None:
    """Make the equal dictionaries of several files one again."""
    first = saes[0]
    for sae in saes[1:]:
        pairs = ((sae.encoder.weight, first.encoder.weight), (sae.W_dec, first.W_dec))
        if not all(torch.equal(own, common) for own, common in pairs):
            raise ValueError(
                f"stack {folder}: resae.json says that all layers share one dictionary, but their "
                f"files hold different ones; restore them"
            )
        sae.encoder.weight, sae.W_dec = first.encoder.weight, first.W_dec


class AffineOnly:
    """The baseline without autoencoders: the first selected layer as it is, the rest from the maps.

    Has of `ReSAE` what replacement and evaluation use.
    """

    def __init__(self, stack: ReSAE):
        self.hook_points = stack.hook_points
        self.predictor = stack.predictor
        self.n_layers = stack.n_layers
        self.require_model = stack.require_model

    def active_total(self, layer: int) -> int:  # noqa: ARG002
        return 0

    def __call__(self, xs: Sequence[Tensor], *, loop: Loop = "open") -> StackOutput:  # noqa: ARG002
        x_hats: list[Tensor] = []
        for layer, x in enumerate(xs):
            x_hats.append(self.step(layer, x, x_hats, x_hats)[0])
        return StackOutput(x_hats, [])

    def step(
        self,
        layer: int,
        x: Tensor,
        seen: Sequence[Tensor],  # noqa: ARG002
        put_in: Sequence[Tensor],
    ) -> tuple[Tensor, None]:
        prediction = self.predictor(layer, put_in)
        return x if prediction is None else prediction, None


def _check_loop(loop: str) -> str:
    if loop not in ("open", "closed"):
        raise ValueError(f"loop={loop!r}, expected 'open' or 'closed'")
    return loop
