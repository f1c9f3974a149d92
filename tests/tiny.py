"""Small random models and stacks that the tests share."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import resae.stack.stack as stack_module
from resae import AffinePredictor, HookedLM, Moments, ReSAE, fit_predictor
from resae.assets import TINY_PYTHIA
from resae.data.activations import capture_tokens
from resae.models.identity import ModelIdentity
from resae.stack.stack import new_stack

LAYERS = (0, 1, 3)
NAMES = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]


def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_PYTHIA)


def pythia(parallel: bool = True, blocks: int = 4) -> HookedLM:
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        use_parallel_residual=parallel,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _loud(HookedLM(GPTNeoXForCausalLM(config).eval(), tokenizer(), "tiny-neox"))


def gemma2(blocks: int = 4) -> HookedLM:
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
        sliding_window=8,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _loud(HookedLM(Gemma2ForCausalLM(config).eval(), None, "tiny-gemma2"))


def gemma3() -> HookedLM:
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _loud(HookedLM(Gemma3ForCausalLM(config).eval(), None, "tiny-gemma3"))


def gpt2() -> HookedLM:
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=2048,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_inner=64,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _loud(HookedLM(GPT2LMHeadModel(config).eval(), None, "tiny-gpt2"))


def _llama_like(config_class, model_class, name: str) -> HookedLM:
    torch.manual_seed(5)
    config = config_class(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _loud(HookedLM(model_class(config).eval(), None, name))


def llama() -> HookedLM:
    return _llama_like(LlamaConfig, LlamaForCausalLM, "tiny-llama")


def qwen2() -> HookedLM:
    return _llama_like(Qwen2Config, Qwen2ForCausalLM, "tiny-qwen2")


def qwen3() -> HookedLM:
    return _llama_like(Qwen3Config, Qwen3ForCausalLM, "tiny-qwen3")


class _LimeBlock(nn.Module):
    """Reads a mixture of all streams so far, on its own device, and hands them on in a tuple."""

    def __init__(self, layer: int):
        super().__init__()
        self.attention = nn.Linear(32, 32)
        self.mlp = nn.Linear(32, 32)
        self.routing = nn.Parameter(torch.randn(layer + 1))

    def forward(self, hidden_states, states):
        states = [state.to(self.routing.device) for state in (*states, hidden_states)]
        read = torch.einsum("s,sbtd->btd", self.routing, torch.stack(states))
        return states[-1] + self.attention(read) + self.mlp(read), states


class _LimeBase(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2048, 32)
        self.layers = nn.ModuleList(_LimeBlock(layer) for layer in range(4))

    def forward(self, input_ids, **_):
        stream, self.states = self.embed(input_ids), []
        for block in self.layers:
            output = block(hidden_states=stream, states=self.states)
            assert isinstance(output, tuple)
            stream, self.states = output
        return stream


class _Lime(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            model_type="gpt_neox", hidden_size=32, vocab_size=2048, use_parallel_residual=True
        )
        self.gpt_neox = _LimeBase()

    def forward(self, **kwargs):
        return SimpleNamespace(logits=self.gpt_neox(**kwargs))


def lime() -> HookedLM:
    """A model outside Hugging Face whose blocks return a tuple with further state, as LIMe's do."""
    torch.manual_seed(6)
    return HookedLM(_Lime())


def _loud(lm: HookedLM) -> HookedLM:
    """Larger weights than at initialisation, so that every layer changes the stream visibly."""
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return lm


FAMILIES = {
    "pythia": pythia,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def ids(rows: int = 3, length: int = 12, seed: int = 3) -> torch.Tensor:
    """Token ids `[rows, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 2048, (rows, length), generator=generator)


def predictor(lm: HookedLM, kind: str, layers=LAYERS, **map_type) -> AffinePredictor:
    points = lm.hook_points(layers)
    moments = Moments(len(points), lm.d_model)
    moments.add(capture_tokens(lm, ids(16, 16, seed=5), points))
    return fit_predictor(kind, moments, **map_type)


def stack(
    lm: HookedLM,
    kind: str = "previous",
    k: int = 4,
    d_sae: int | tuple[int, ...] = 64,
    layers: tuple[int, ...] = LAYERS,
    **map_type,
) -> ReSAE:
    """An untrained stack on a few blocks: random directions, fitted maps."""
    made = new_stack(
        [point.name for point in lm.hook_points(layers)],
        predictor(lm, kind, layers, **map_type),
        d_in=lm.d_model,
        d_sae=d_sae,
        k=(k,) * len(layers),
        seed=7,
        model=ModelIdentity.of(lm),
    )
    return made.eval()


def exact_stack(lm: HookedLM, kind: str = "previous") -> ReSAE:
    """A stack that reconstructs everything: latents ±e_i, all of them active."""
    D = lm.d_model
    made = new_stack(
        NAMES,
        predictor(lm, kind),
        d_in=D,
        d_sae=2 * D,
        k=(2 * D,) * len(NAMES),
        model=ModelIdentity.of(lm),
    )
    axes = torch.cat([torch.eye(D), -torch.eye(D)])
    for layer in range(len(NAMES)):
        made.sae(layer).encoder.weight.data.copy_(axes)
        made.sae(layer).W_dec.data.copy_(axes)
    return made.eval()


def carried_steps(monkeypatch) -> list[torch.Size]:
    """Shapes that `ReSAE.step` passes to `online_step` together with transported dictionaries."""
    steps: list[torch.Size] = []
    fused = stack_module.online_step

    def step(x, *args, transported=None, **options):
        if transported is not None:
            steps.append(x.shape)
        return fused(x, *args, transported=transported, **options)

    monkeypatch.setattr(stack_module, "online_step", step)
    return steps
