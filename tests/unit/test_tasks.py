"""The tasks that come with Everstep: sums that do not depend on the cut, and models that learn."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch import nn

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.collate import Pack, Pad, Segments
from everstep.trainer.data.columns import Ragged
from everstep.trainer.models.convnet import ConvNet
from everstep.trainer.models.gpt import GPT
from everstep.trainer.models.image_text import ImageText
from everstep.trainer.models.mlp import MLP
from everstep.trainer.models.vit import VisionTransformer
from everstep.trainer.task import Batch, Task
from everstep.trainer.task_calls import inputs
from everstep.trainer.tasks.classification import ImageClassifier, TabularClassifier
from everstep.trainer.tasks.documents import DocumentClassifier, TextEncoder
from everstep.trainer.tasks.forecasting import QuantileForecast, WindowNetwork
from everstep.trainer.tasks.image_text import ImageTextContrast
from everstep.trainer.tasks.language import LanguageModel
from everstep.trainer.tasks.recommendation import MatrixFactorization, Recommendation
from everstep.trainer.tasks.subword_language import SubwordLanguageModel

CONF = Path(__file__).parents[2] / "conf"


def tiny_gpt() -> GPT:
    return GPT(width=16, depth=2, heads=2, context=12)


def some_text(samples: int = 6) -> Batch:
    torch.manual_seed(0)
    return {"tokens": torch.randint(0, 256, (samples, 13), dtype=torch.uint8)}


def tiny_encoder() -> TextEncoder:
    return TextEncoder(classes=3, vocab=50, width=16, heads=2, context=12, dropout=0.0)


def some_documents() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 12, 5, 7, 2, 9])
    tokens = torch.randint(0, 2**31 - 1, (6, 12), dtype=torch.int32) * (torch.arange(12) < lengths[:, None])
    return {"tokens": tokens, "lengths": lengths, "label": torch.arange(6) % 3, "most_frequent": torch.ones(6).long()}


def some_windows() -> Batch:
    values = torch.arange(6.0)[:, None] + torch.linspace(0, 20, 16).sin()
    return {"past": values[:, :12], "future": values[:, 12:], "scale": torch.full((6,), 0.5)}


def some_pairs() -> Batch:
    rank, seen = torch.tensor([0, 30, 2, 3, 9, 10]), torch.arange(12).view(6, 2)
    return {"user": torch.arange(6), "item": torch.arange(6) + 20, "seen": seen, "popularity_rank": rank}


def packed_documents(rows: int = 6) -> Batch:
    """Rows of packed documents, each ended by the token 0, and bytes of tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 6, (rows, 13))
    found = Segments(separator=0)({"tokens": tokens})
    return {**found, "bytes": tokens + 1, "baseline_bits": torch.rand(rows, 13)}


CASES: list[tuple[Task, Batch]] = [
    (DocumentClassifier(tiny_encoder), some_documents()),
    (QuantileForecast(lambda: WindowNetwork(12, 4, dropout=0.0), season=8), some_windows()),
    (Recommendation(lambda: MatrixFactorization(6, 40)), some_pairs()),
    (LanguageModel(tiny_gpt), some_text()),
    (
        ImageClassifier(lambda: ConvNet(width=8, groups=4)),
        {"image": torch.rand(6, 1, 8, 8), "label": torch.arange(6)},
    ),
    (
        ImageClassifier(lambda: VisionTransformer(width=16, heads=2, dropout=0.0)),
        {"image": torch.rand(6, 1, 8, 8), "label": torch.arange(6), "baseline": torch.ones(6, dtype=torch.int64)},
    ),
    (SubwordLanguageModel(tiny_gpt), packed_documents()),
    (TabularClassifier(lambda: MLP(5, 3)), {"features": torch.rand(6, 5), "target": torch.arange(6) % 3}),
]


@pytest.mark.parametrize(("task", "batch"), CASES, ids=lambda value: type(value).__name__)
def test_the_sums_over_a_batch_do_not_depend_on_how_it_is_cut(task: Task, batch: Batch) -> None:
    torch.manual_seed(1)
    model = task.model().eval()
    whole = task.evaluate(model, batch)
    parts = [task.evaluate(model, {k: v[a:b] for k, v in batch.items()}) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert whole.count == sum(part.count for part in parts)
    torch.testing.assert_close(whole.sum, torch.stack([part.sum for part in parts]).sum())
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, torch.stack([part.metrics[name] for part in parts]).sum())


@pytest.mark.parametrize(("task", "batch"), CASES, ids=lambda value: type(value).__name__)
def test_a_few_steps_on_one_batch_lower_the_loss_and_reach_every_parameter(task: Task, batch: Batch) -> None:
    torch.manual_seed(1)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.sum.backward()
        optimizer.step()
        losses.append(loss.sum.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", [tiny_gpt, ConvNet, VisionTransformer, lambda: ImageText(9), lambda: MLP(5, 3)])
def test_no_model_keeps_running_statistics(build: object) -> None:
    model: nn.Module = build()  # type: ignore[operator]
    assert list(model.buffers()) == []
    assert isinstance(model.blocks, nn.ModuleList)


def test_an_untrained_language_model_needs_about_eight_bits_a_byte() -> None:
    task = LanguageModel(tiny_gpt)
    loss = task.evaluate(task.model(), some_text())
    assert loss.count == 6 * 12
    assert abs(loss.metrics["bits_per_byte"].item() / loss.count - 8) < 0.3
    assert abs(loss.sum.item() / loss.count - math.log(256)) < 0.2


def test_the_gpt_sees_no_byte_before_its_turn() -> None:
    model = tiny_gpt().eval()
    tokens = some_text()["tokens"].long()[:, :12]
    changed = tokens.clone()
    changed[:, 7:] = 0
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(tokens)[:, 7:], model(changed)[:, 7:])


def test_the_logits_of_packed_documents_are_those_of_each_document_alone() -> None:
    torch.manual_seed(0)
    model = tiny_gpt().double().eval()
    batch = packed_documents()
    packed = model(*(batch[name][:, :12] for name in ("tokens", "segments", "positions")))
    documents = 0
    for row, segments in enumerate(batch["segments"][:, :12]):
        for segment in segments.unique():
            own = segments == segment
            alone = model(batch["tokens"][row, :12][own][None])[0]
            torch.testing.assert_close(packed[row, own], alone, rtol=0, atol=1e-6)
            documents += 1
    assert documents > 10
    crossing = model(batch["tokens"][:, :12])
    assert (packed - crossing).abs().max() > 1e-3


def test_losses_of_subwords_are_per_byte_of_the_tokens_that_follow_one_of_their_document() -> None:
    task, batch = SubwordLanguageModel(tiny_gpt), packed_documents()
    model = task.model().eval().requires_grad_(False)
    found = task.evaluate(model, batch)
    follows = batch["segments"][:, 1:] == batch["segments"][:, :-1]
    assert found.count == batch["bytes"][:, 1:][follows].sum()
    assert 0 < follows.sum() < follows.numel()
    assert found.metrics["baseline_bits_per_byte"] == pytest.approx(batch["baseline_bits"][:, 1:][follows].sum())
    rows = task.predict(model, batch)
    assert (rows["loss"] * rows["bytes"]).nansum() == pytest.approx(found.sum.item(), rel=1e-6)
    with pytest.raises(DataError, match="this task needs the column 'segments'; the data has tokens"):
        task.loss(model, {"tokens": batch["tokens"]})


def glyph_pairs() -> Batch:
    torch.manual_seed(0)
    name = torch.tensor([0, 1, 2, 0, 3, 1])
    return {"image": torch.rand(6, 1, 16, 16), "words": 1 + name[:, None].repeat(1, 2), "name": name}


def test_contrast_learns_to_find_the_text_of_each_image_and_gives_vectors_of_length_one() -> None:
    batch = glyph_pairs()
    task = ImageTextContrast(lambda: ImageText(5, size=16, width=8, dropout=0.0))
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch).sum.backward()
        optimizer.step()
    model.eval()
    found = task.evaluate(model, batch).metrics["retrieval"].compute()
    assert found["recall_at_1"] == 1
    assert found["baseline_recall_at_1"] == 1 / 4
    vectors = task.predict(model, batch)
    assert {name: value.shape for name, value in vectors.items()} == {"image": (6, 64), "text": (6, 64)}
    for value in vectors.values():
        torch.testing.assert_close(value.norm(dim=1), torch.ones(6))


def test_pairs_of_one_text_share_its_probability() -> None:
    task = ImageTextContrast(lambda: ImageText(5))
    vectors = torch.eye(3)[[0, 1, 0]]
    found = task.batch_loss({"image": 30 * vectors, "text": vectors})
    assert found.sum.item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert task.batch_loss({"image": 30 * torch.eye(3), "text": torch.eye(3)}).sum < 1e-6


def test_recall_is_over_the_whole_set_and_does_not_depend_on_its_parts() -> None:
    from everstep.trainer.tasks.retrieval import RetrievalRecall

    torch.manual_seed(0)
    names = torch.arange(24).repeat(2)[torch.randperm(48)]
    candidates = torch.randn(24, 8)[names]
    queries = candidates + 1.5 * torch.randn(48, 8)
    gallery = torch.stack([candidates[names == name][0] for name in range(24)])
    order = (queries @ gallery.T).argsort(dim=1, descending=True)
    values = []
    for parts in ([48], [5, 40, 3]):
        metric = RetrievalRecall()
        for part in zip(*(value.split(parts) for value in (queries, candidates, names)), strict=True):
            metric.update(*part)
        values.append(metric.compute())
    for top in (1, 10):
        wanted = (order[:, :top] == names[:, None]).any(dim=1).double().mean()
        assert 0.2 < wanted < 1
        assert values[0][f"recall_at_{top}"] == values[1][f"recall_at_{top}"] == wanted
        assert values[0][f"baseline_recall_at_{top}"] == top / 24


def test_candidates_that_are_all_the_same_find_nothing() -> None:
    from everstep.trainer.tasks.retrieval import RetrievalRecall

    metric = RetrievalRecall()
    metric.update(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))
    assert metric.compute()["recall_at_1"] == 0


def test_a_sequence_beyond_the_context_is_refused_with_both_keys() -> None:
    with pytest.raises(Exception, match=r"model\.context=12.*smaller data\.block"):
        tiny_gpt()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(Exception, match=r"model\.width=10"):
        GPT(width=10, heads=4)
    with pytest.raises(Exception, match=r"model\.size=8: the images are of 9 × 8 pixels"):
        VisionTransformer()(torch.zeros(1, 1, 9, 8))
    with pytest.raises(Exception, match=r"model\.size=9 is not a multiple of model\.patch=2"):
        VisionTransformer(size=9)
    assert VisionTransformer(size=9, patch=3)(torch.zeros(2, 1, 9, 9)).shape == (2, 10)
    with pytest.raises(Exception, match=r"model\.size=20 is not a multiple"):
        ImageText(5, size=20)


class Counted(nn.Module):
    """As DDP does, holds the model as `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.module(tokens)
        return out


def test_a_preview_is_the_same_each_time_and_takes_a_fixed_number_of_passes() -> None:
    torch.manual_seed(0)
    model = Counted(tiny_gpt())
    task = LanguageModel(tiny_gpt, preview_bytes=30)
    first = task.preview(model)
    torch.rand(5)
    assert task.preview(model) == first
    assert first.startswith("def read(path: str)")
    assert model.calls == 60
    assert model.training
    with torch.no_grad():
        model.module.head.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    assert task.preview(model).startswith("def read")


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    batch = some_text()
    task = LanguageModel(lambda: GPT(width=16, depth=1, heads=2, context=12, dropout=0.5))
    model = task.model()
    assert task.loss(model, batch).sum != task.loss(model, batch).sum
    model.eval()
    assert task.loss(model, batch).sum == task.loss(model, batch).sum


@pytest.mark.parametrize(
    "file",
    sorted(file for group in ("task", "model", "data") for file in CONF.glob(f"{group}/*.yaml")),
    ids=lambda file: file.stem,
)
def test_every_plug_in_of_conf_can_be_imported_and_takes_its_keys(file: Path) -> None:
    import importlib
    import inspect

    node = yaml.safe_load(file.read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    assert module in ("everstep.tasks", "everstep.models", "everstep.data")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(node) <= set(parameters)


def mean_loss(task: LanguageModel, model: nn.Module, batch: Batch) -> tuple[float, int]:
    loss = task.loss(model, batch)
    return loss.sum.item(), int(loss.count)


def test_only_tokens_that_follow_on_one_of_their_own_document_are_targets() -> None:
    torch.manual_seed(0)
    task, model = LanguageModel(tiny_gpt), tiny_gpt().eval()
    tokens = some_text(2)["tokens"]
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0], [3] * 13], dtype=torch.int32)
    counted = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 12], dtype=torch.bool)
    logits = model(tokens.long()[:, :-1])
    each = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.long()[:, 1:].flatten(), reduction="none")
    loss = task.evaluate(model, {"tokens": tokens, "segments": segments})
    assert int(loss.count) == int(counted.sum()) == 20
    torch.testing.assert_close(loss.sum, each[counted.flatten()].sum())
    torch.testing.assert_close(loss.metrics["bits_per_byte"] * math.log(2), loss.sum)


def test_segments_of_one_document_change_nothing_and_padding_alone_counts_nothing() -> None:
    task, model, batch = LanguageModel(tiny_gpt), tiny_gpt().eval(), some_text()
    ones = torch.ones(batch["tokens"].shape, dtype=torch.int32)
    assert mean_loss(task, model, {**batch, "segments": ones}) == mean_loss(task, model, batch)
    nothing = task.loss(model, {**batch, "segments": 0 * ones})
    assert (nothing.sum.item(), int(nothing.count)) == (0.0, 0)
    nothing.sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_padding_adds_neither_loss_nor_targets_whatever_it_is_filled_with() -> None:
    task, model = LanguageModel(tiny_gpt), tiny_gpt().eval()
    column = Ragged.of([torch.arange(3), torch.arange(13) + 60, torch.arange(1), torch.arange(0)])
    singly = [mean_loss(task, model, {"tokens": column[row][None]}) for row in (0, 1)]
    for value in (0, 255):
        total, count = mean_loss(task, model, Pad(value=value)({"tokens": column}))
        assert count == 2 + 12 == sum(n for _, n in singly)
        assert total == pytest.approx(sum(one for one, _ in singly), rel=1e-5)


def test_packing_documents_counts_all_their_targets_but_the_first_of_each() -> None:
    column = Ragged.of([torch.arange(5), torch.arange(7), torch.arange(13), torch.arange(2)])
    _, count = mean_loss(LanguageModel(tiny_gpt), tiny_gpt(), Pack(13)({"tokens": column}))
    assert count == 4 + 6 + 12 + 1


def test_a_task_on_data_of_another_kind_is_told_what_a_batch_has() -> None:
    pixels = inputs({"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2)}, torch.bfloat16)
    assert (pixels["image"].dtype, pixels.get("tokens")) == (torch.bfloat16, None)
    with pytest.raises(ConfigError, match=r"^a batch has image, label, and the task asks for 'tokens': choose data="):
        LanguageModel(Mock()).loss(Mock(), pixels)
    with pytest.raises(ConfigError, match="did you mean 'label'"):
        pixels["labels"]


@pytest.mark.parametrize("filled", [0, 7])
def test_the_loss_of_a_document_is_the_same_alone_and_in_a_padded_batch(filled: int) -> None:
    task, model, batch = DocumentClassifier(tiny_encoder), tiny_encoder().double().eval(), some_documents()
    real = torch.arange(12) < batch["lengths"][:, None]
    together = task.loss(model, {**batch, "tokens": batch["tokens"].masked_fill(~real, filled)})
    alone = [
        task.loss(model, {name: column[row : row + 1] for name, column in batch.items()}
                  | {"tokens": batch["tokens"][row : row + 1, : batch["lengths"][row]]}).sum
        for row in range(6)
    ]  # fmt: skip
    torch.testing.assert_close(together.sum, torch.stack(alone).sum(), rtol=1e-12, atol=0)
    model.words.weight.data.mul_(-1)
    assert task.loss(model, batch).sum != together.sum


def test_a_document_beyond_the_context_is_refused_with_both_keys() -> None:
    with pytest.raises(ConfigError, match=r"model\.context=12; choose a smaller data\.max_length"):
        tiny_encoder()(torch.zeros(1, 13, dtype=torch.int64), torch.tensor([13]))


def test_recall_counts_items_among_the_best_that_the_user_has_not_seen() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 3.0, 2.0]])
    task = Recommendation(nn.Identity, top=2)
    batch = {
        "user": scores,
        "item": torch.tensor([2, 0, 3]),
        "seen": torch.tensor([[0], [3], [1]]),
        "popularity_rank": torch.tensor([0, 1, 2]),
    }
    found = task.evaluate(nn.Identity(), batch).metrics
    assert found["recall_at_2"] == 2, "the third best with one of the better ones seen, not one of equals, the second"
    assert found["baseline_recall_at_2"] == 2
    assert task.predict(nn.Identity(), batch)["items"].tolist()[0] == [1, 2]


def test_sparse_gradients_hold_the_users_of_the_batch_alone() -> None:
    model = MatrixFactorization(100, 40, sparse=True)
    Recommendation(lambda: model).loss(model, some_pairs()).sum.backward()
    assert model.users.weight.grad is not None
    assert model.users.weight.grad.coalesce().indices().tolist() == [[0, 1, 2, 3, 4, 5]]


def test_a_forecast_is_measured_in_units_of_its_scale_beside_last_seasons_values() -> None:
    task = QuantileForecast(nn.Identity, quantiles=[0.25, 0.5, 0.75], season=3)
    batch = {
        "past": torch.arange(6.0)[None],
        "future": torch.tensor([[3.0, 5.0, 5.0, 5.0]]),
        "scale": torch.ones(1) * 2,
    }
    model = Mock(return_value=torch.tensor([4.0, 5.0, 7.0]).expand(1, 4, 3))
    found = task.evaluate(model, batch)
    assert found.metrics["mase"].item() == pytest.approx((2 + 0 + 0 + 0) / 4 / 2)
    assert found.metrics["baseline_mase"].item() == pytest.approx((0 + 1 + 0 + 2) / 4 / 2)
    assert found.metrics["coverage"].item() == pytest.approx(3 / 4)
    over = 0.75 * 1 + 0.5 * 2 + 0.25 * 4, 0.25 * 1 + 0 + 0.25 * 2
    assert found.sum.item() == pytest.approx((over[0] + 3 * over[1]) / 12 / 2)
    model = Mock(return_value=torch.zeros(1, 4, 2))
    with pytest.raises(ConfigError, match=r"change model\.horizon or model\.quantiles"):
        task.loss(model, batch)


@pytest.mark.parametrize("quantiles", [[], [0.5, 0.1], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5]])
def test_quantiles_that_are_none_are_refused(quantiles: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"task\.quantiles=.*must be between 0 and 1, in ascending order"):
        QuantileForecast(nn.Identity, quantiles)


def test_a_forecast_moves_with_the_level_and_spread_of_the_past() -> None:
    model, past = WindowNetwork(12, 4, dropout=0.0).double(), some_windows()["past"].double()
    torch.testing.assert_close(model(5 * past + 300), 5 * model(past) + 300)
