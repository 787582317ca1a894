"""QLoRA training on tiny real models: what changes, what must not, and the guard around bitsandbytes' fast path."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow, render_prompt
from tests.support.conversations import easy_rows, make_dataset, make_messages
from tests.support.tiny import load_tiny_base, save_tiny_base
from training.config import TrainSettings
from training.lora import add_adapter, disable_packed_kernels
from training.losses import evaluate, token_sums
from training.methods import TrainingRun
from training.methods.sft import train_sft
from training.rendering import collate, render_dataset

NUM_LINEAR_LAYERS = 2 * 7  # of the tiny model: q, k, v, o, gate, up and down in each of its two layers
QUANTISATIONS = ["none", "nf4"]


@dataclass
class Recorder:
    """A listener that keeps what it is told, and the precisions of the trained parameters at that moment."""

    model: Any = None
    steps: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    precisions: set[torch.dtype] = field(default_factory=set)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Keep one step."""
        self.steps.append((step, num_steps))
        self.losses.append(loss)
        if self.model is not None:
            self.precisions |= {parameter.dtype for _, parameter in _trained(self.model)}


def _settings(tmp_path: Path, **changes: Any) -> TrainSettings:
    """Settings under which a tiny model learns its rows in a dozen steps."""
    defaults: dict[str, Any] = {"rank": 8, "alpha": 16, "batch_size": 4, "epochs": 4, "warmup_steps": 1}
    return TrainSettings.load(tmp_path / "home", **(defaults | {"learning_rate": 1e-2} | changes))


def _rows(tmp_path: Path, base: LoadedBase, num_rows: int = 10) -> list[RenderedRow]:
    dataset = make_dataset(tmp_path / "data.jsonl", easy_rows(num_rows))
    return render_dataset(base.tokenizer, dataset, max_length=512)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _trained(model)}


def _frozen_bytes(model: torch.nn.Module) -> dict[str, list[bytes]]:
    """Everything in the model that is not the adapter, bit for bit, the 4-bit weights' scales included."""
    tensors = {name: [p.data] for name, p in model.named_parameters() if "lora_" not in name}
    tensors |= {name: [buffer] for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors[name] = [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    return {
        name: [tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in parts]
        for name, parts in tensors.items()
    }


def _train(
    tmp_path: Path, folder: Path, settings: TrainSettings, *, quantisation: str = "none", num_rows: int = 10
) -> tuple[LoadedBase, Any, Recorder]:
    base = load_tiny_base(folder, quantisation=quantisation)
    model = add_adapter(base, settings)
    recorder = Recorder(model)
    rows = _rows(tmp_path, base, num_rows)
    counts = train_sft(TrainingRun(model, base, rows, settings, recorder))
    assert counts.num_steps == len(recorder.steps)
    if settings.max_steps is None and settings.epochs == 1:
        assert counts.num_tokens == sum(len(row.input_ids) for row in rows)
    return base, model, recorder


def _has_fast_path() -> bool:
    return bool(has_avx512bf16())


def _gradient(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.train()
    loss = token_sums(model.get_base_model(), batch).loss
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in _trained(model)])
    return torch.cat([gradient.flatten() for gradient in gradients])


def _cosine_across_an_evaluation(base: LoadedBase, model: Any, rows: list[RenderedRow]) -> float:
    """Cosine between the gradients before and after one evaluation pass, which changes no weight."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in _trained(model):  # lora_B begins as zero, which would hide the gradient of lora_A
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    pad_token_id = base.tokenizer.pad_token_id
    batch = collate(rows, pad_token_id=pad_token_id)
    before = _gradient(model, batch)
    evaluate(base.model, rows, batch_size=4, pad_token_id=pad_token_id)
    return torch.cosine_similarity(before, _gradient(model, batch), dim=0).item()


# The guard around bitsandbytes' fast path.


def test_disable_packed_kernels_counts_every_layer_when_the_base_is_quantised(tiny_folders: dict[str, Path]) -> None:
    """It reaches all 4-bit layers, on machines with and without the fast path, and says how many."""
    base = load_tiny_base(tiny_folders["llama"], quantisation="nf4")
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a machine with the fast path

    num_layers = disable_packed_kernels(base.model)

    assert num_layers == NUM_LINEAR_LAYERS
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * NUM_LINEAR_LAYERS


def test_disable_packed_kernels_finds_nothing_when_the_base_is_not_quantised(tiny_base: LoadedBase) -> None:
    """A base in full precision has no such layers and is left alone."""
    assert disable_packed_kernels(tiny_base.model) == 0


def test_add_adapter_sets_the_guard_when_the_base_is_quantised(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Whoever puts an adapter on a 4-bit base gets a model that may be evaluated between training steps."""
    base = load_tiny_base(tiny_folders["llama"], quantisation="nf4")
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True

    model = add_adapter(base, _settings(tmp_path))

    flags = [module.support_avx512bf16_for_cpu for module in model.modules() if isinstance(module, Linear4bit)]
    assert flags == [False] * NUM_LINEAR_LAYERS


def test_gradients_stay_the_same_when_the_model_was_evaluated_between(tmp_path: Path, wide_folder: Path) -> None:
    """An evaluation pass before or during training leaves every later gradient as it would have been."""
    base = load_tiny_base(wide_folder, quantisation="nf4")
    model = add_adapter(base, _settings(tmp_path))

    assert _cosine_across_an_evaluation(base, model, _rows(tmp_path, base)) > 0.999


@pytest.mark.skipif(not _has_fast_path(), reason="this CPU has no AVX512-BF16: bitsandbytes never repacks weights")
@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning")
def test_gradients_break_when_the_guard_is_taken_away(tmp_path: Path, wide_folder: Path) -> None:
    """The defect that the guard is for is still there; when this fails, bitsandbytes is mended and the guard can go."""
    base = load_tiny_base(wide_folder, quantisation="nf4")
    model = add_adapter(base, _settings(tmp_path))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True

    assert _cosine_across_an_evaluation(base, model, _rows(tmp_path, base)) < 0.99


# What an adapter is put on.


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_add_adapter_trains_lora_alone_when_it_is_put_on_a_base(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """Every linear layer of the decoder gets A and B of the asked rank; the base, head and embeddings are frozen."""
    base = load_tiny_base(tiny_folders["llama"], quantisation=quantisation)

    model = add_adapter(base, _settings(tmp_path, rank=3))

    shapes = {name: tuple(parameter.shape) for name, parameter in _trained(model)}
    assert len(shapes) == 2 * NUM_LINEAR_LAYERS
    assert {3} == {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    assert {3} == {shape[1] for name, shape in shapes.items() if ".lora_B." in name}
    assert not [name for name in shapes if "lm_head" in name or "embed" in name]


def test_add_adapter_changes_no_logit_when_it_is_fresh(tmp_path: Path, tiny_base: LoadedBase) -> None:
    """Training starts from the base: lora_B is zero."""
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = tiny_base.model(ids).logits
        actual = add_adapter(tiny_base, _settings(tmp_path)).eval()(ids).logits

    assert torch.equal(expected, actual)


# Training.


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_train_sft_changes_the_adapter_alone_when_it_trains(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """Every LoRA matrix has moved and every bit of the base is where it was."""
    base = load_tiny_base(tiny_folders["llama"], quantisation=quantisation)
    settings = _settings(tmp_path, max_steps=4)
    model = add_adapter(base, settings)
    frozen, adapter = _frozen_bytes(model), _adapter(model)

    train_sft(TrainingRun(model, base, _rows(tmp_path, base), settings, Recorder()))

    assert len(frozen) > NUM_LINEAR_LAYERS
    assert frozen == _frozen_bytes(model)
    assert adapter.keys() == _adapter(model).keys()
    assert [name for name, value in _adapter(model).items() if torch.equal(value, adapter[name])] == []


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_train_sft_keeps_the_adapter_in_float32_when_the_base_is_in_any_precision(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """Updates smaller than bfloat16's eight bits are not lost: at every step the trained values are float32."""
    settings = _settings(tmp_path, max_steps=3, learning_rate=1e-5)

    _, model, recorder = _train(tmp_path, tiny_folders["llama"], settings, quantisation=quantisation)

    assert {torch.float32} == recorder.precisions
    rounded = {name: value.bfloat16().float() for name, value in _adapter(model).items()}
    assert [name for name, value in _adapter(model).items() if torch.equal(value, rounded[name])] == []


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        ({"epochs": 2}, 6),  # 10 rows are batches of 4, 4 and 2
        ({"epochs": 0.5}, 2),
        ({"epochs": 2, "batch_size": 10}, 2),
        ({"epochs": 2, "gradient_accumulation": 2}, 4),
        ({"epochs": 1, "max_steps": 5}, 5),
    ],
    ids=str,
)
def test_train_sft_reports_every_step_when_it_trains(
    tmp_path: Path, tiny_folders: dict[str, Path], changes: dict[str, Any], num_steps: int
) -> None:
    """The listener hears each optimiser step once, in order, with the total that is reached in the end."""
    _, _, recorder = _train(tmp_path, tiny_folders["llama"], _settings(tmp_path, **changes))

    assert [(step, num_steps) for step in range(1, num_steps + 1)] == recorder.steps


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_train_sft_learns_the_answer_and_its_end_when_rows_are_easy(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """The reported loss falls, and the model then gives the answer to a new question and stops."""
    base, model, recorder = _train(
        tmp_path, tiny_folders["llama"], _settings(tmp_path, epochs=8), quantisation=quantisation
    )

    assert max(recorder.losses[-3:]) < 0.2 * min(recorder.losses[:3])
    prompt = torch.tensor([render_prompt(base.tokenizer, make_messages("Q77?"))])
    answer = model.eval().generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )
    assert base.tokenizer.decode(answer[0, prompt.shape[1] :]) == "Yes!<|im_end|>"


@pytest.mark.parametrize(("batch_size", "gradient_accumulation"), [(6, 1), (2, 3), (1, 6)])
def test_train_sft_weighs_every_token_the_same_when_a_step_is_split(
    tmp_path: Path, tiny_base: LoadedBase, batch_size: int, gradient_accumulation: int
) -> None:
    """A step over all rows reports their mean loss a token, however many forward passes it is made of."""
    lengths = [1, 30, 2, 17, 5, 60]
    dataset = make_dataset(tmp_path / "data.jsonl", [make_messages("q", "a" * length) for length in lengths])
    rows = render_dataset(tiny_base.tokenizer, dataset, max_length=512)
    settings = _settings(tmp_path, max_steps=1, batch_size=batch_size, gradient_accumulation=gradient_accumulation)
    model = add_adapter(tiny_base, settings)
    expected = evaluate(tiny_base.model, rows, batch_size=6, pad_token_id=tiny_base.tokenizer.pad_token_id).loss
    recorder = Recorder()

    train_sft(TrainingRun(model, tiny_base, rows, settings, recorder))

    assert pytest.approx([expected], rel=1e-4) == recorder.losses


def test_train_sft_takes_loss_from_the_answers_alone_when_rows_are_trained(
    tmp_path: Path, tiny_base: LoadedBase
) -> None:
    """The first step's loss is, token by token, that of the marked tokens under the base model."""
    rows = _rows(tmp_path, tiny_base, 3)
    expected = _loss_of_marked_tokens(tiny_base.model, rows)
    settings = _settings(tmp_path, max_steps=1)
    recorder = Recorder()

    train_sft(TrainingRun(add_adapter(tiny_base, settings), tiny_base, rows, settings, recorder))

    assert pytest.approx([expected], rel=1e-4) == recorder.losses


def _loss_of_marked_tokens(model: Any, rows: list[RenderedRow]) -> float:
    """Mean loss of the marked tokens, written out from the logits a row at a time."""
    losses: list[float] = []
    for row in rows:
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
        marked = [index for index, carries_loss in enumerate(row.loss_mask) if carries_loss]
        losses += [-log_probabilities[index - 1, row.input_ids[index]].item() for index in marked]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_train_sft_gives_the_same_bits_when_the_seed_is_the_same(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """Initialisation, order of rows and dropout all come from the seed, whatever was drawn before."""
    adapters = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        random.seed(noise)
        torch.manual_seed(noise)
        settings = _settings(tmp_path, seed=seed, dropout=0.2, max_steps=2)
        _, model, _ = _train(tmp_path, tiny_folders["llama"], settings, quantisation=quantisation)
        adapters.append(_adapter(model))

    first, again, other = adapters
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    assert [name for name, value in first.items() if torch.equal(value, other[name])] == []


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_train_sft_takes_the_same_steps_when_activations_are_recomputed(
    tmp_path: Path, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """Gradient checkpointing saves memory and changes no result."""
    losses = []
    for gradient_checkpointing in (False, True):
        settings = _settings(tmp_path, epochs=1, gradient_checkpointing=gradient_checkpointing)
        _, _, recorder = _train(tmp_path, tiny_folders["llama"], settings, quantisation=quantisation)
        losses.append(recorder.losses)

    assert pytest.approx(losses[0], rel=1e-4) == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_train_sft_leaves_no_file_behind_when_it_is_done(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own output folder is temporary and nothing is written where the process happens to stand."""
    cwd, scratch = tmp_path / "cwd", tmp_path / "scratch"
    cwd.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    _train(tmp_path, tiny_folders["llama"], _settings(tmp_path, max_steps=1))

    assert [*cwd.iterdir(), *scratch.glob("hotswap-*")] == []


def test_train_sft_learns_the_same_when_the_base_was_evaluated_before(tmp_path: Path, wide_folder: Path) -> None:
    """A run with a validation file trains the very adapter that a run without one trains."""
    adapters = []
    for is_evaluated in (False, True):
        base = load_tiny_base(wide_folder, quantisation="nf4")
        settings = _settings(tmp_path, max_steps=3)
        model = add_adapter(base, settings)
        rows = _rows(tmp_path, base)
        if is_evaluated:
            evaluate(base.model, rows, batch_size=4, pad_token_id=base.tokenizer.pad_token_id)
        train_sft(TrainingRun(model, base, rows, settings, Recorder()))
        adapters.append(_adapter(model))

    assert [name for name, value in adapters[0].items() if not torch.equal(value, adapters[1][name])] == []


def test_train_sft_trains_every_model_when_its_family_is_supported(tmp_path: Path) -> None:
    """The loss is taken from parts of the model that all families must have."""
    losses = {}
    for family in ("qwen2", "qwen3", "mistral"):
        folder = save_tiny_base(tmp_path / family, family)
        _, _, recorder = _train(tmp_path, folder, _settings(tmp_path, max_steps=5))
        losses[family] = recorder.losses

    assert {family: loss for family, loss in losses.items() if not loss[-1] < 0.8 * loss[0]} == {}
