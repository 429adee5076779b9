"""What TensorBoard shows of several runs, read by the code that serves its tabs."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from hdpo.cli import main
from hdpo.evaluation.records import read_records, recompute, record_path

SMALL = {
    "data": {"selection": {"num_train_problems": 32, "num_val_problems": 12}, "prompts_per_step": 4},
    "model": {"pass_k": [1, 2]},
    "rollouts": {"num_generations": 2, "num_val_samples": 2, "max_new_tokens": 24},
    "trainer": {"max_steps": 2, "val_check_interval": 2, "enable_progress_bar": False},
}
METHODS = {"grpo": 5, "hdpo": 6}

pytestmark = pytest.mark.slow  # two runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs and a report on them, and TensorBoard's reader of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tensorboard"))
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))
        for method, seed in METHODS.items():
            files = ["--config", "lab", "--config", "small.yaml", "--config", f"method/{method}"]
            assert main(["fit", *files, f"--seed_everything={seed}"]) == 0
        assert main(["report", "runs/lab"]) == 0
        folder = Path("runs/lab").resolve()
    reader = plugin_event_multiplexer.EventMultiplexer()
    reader.AddRunsFromDirectory(str(folder))
    reader.Reload()
    return folder, reader


def session_groups(folder, reader):
    """The rows of the HParams tab, with all of its columns."""
    request, provider = RequestContext(), data_provider.MultiplexerDataProvider(reader, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), context.hparams_from_data_provider(request, "", 100)
    )
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, include_metrics=True, allowed_statuses=list(api_pb2.Status.values()),
        aggregation_type=api_pb2.AGGREGATION_AVG,
    )  # fmt: skip
    for info in experiment.hparam_infos:
        asked.col_params.add(hparam=info.name)
    for info in experiment.metric_infos:
        asked.col_params.add(metric=info.name)
    return list_session_groups.Handler(request, context, "", asked).run().session_groups


def test_hparams_of_several_runs_against_their_last_evaluation(runs):
    folder, reader = runs
    groups = {group.name: group for group in session_groups(folder, reader)}
    assert groups.keys() == {"version_0", "version_1"}
    for number, (method, seed) in enumerate(METHODS.items()):
        run, group = folder / f"version_{number}", groups[f"version_{number}"]
        values = {name: value.string_value or value.number_value for name, value in group.hparams.items()}
        assert values == {
            "method": f"lab+small+{method}", "seed_everything": seed, "distillation_weight": float(method == "hdpo"),
            "teacher": "DriftingTeacher", "divergence": "JSD", "lr": 1e-4,
        }  # fmt: skip
        expected = recompute(read_records(record_path(run / "evaluations", 2)), (1, 2))
        metrics = {value.name.tag: (value.training_step, value.value) for value in group.metric_values}
        for metric in ("pass@1", "pass@2", "greedy_accuracy"):
            assert metrics[f"val/{metric}"] == (2, pytest.approx(expected["all"][metric]["value"]))
            assert metrics[f"val/tier2/{metric}"] == (2, pytest.approx(expected["tier2"][metric]["value"]))


def test_images_are_the_reports_figures(runs):
    folder, reader = runs
    (place,) = reader.PluginRunToTagToContent("images")
    assert place == "report/tensorboard/figures"
    for name in ("tradeoff", "sources", "steps"):
        (event,) = reader.Tensors(place, f"report/{name}")
        *_, image = event.tensor_proto.string_val
        shown, drawn = np.asarray(Image.open(io.BytesIO(image))), imread(folder / f"report/{name}.png")[..., :3]
        np.testing.assert_allclose(shown / 255, drawn, atol=1 / 255)


def test_what_is_of_one_source_has_groups_of_its_own(runs):
    """TensorBoard makes a card of each tag, and a group of those with the same first part."""
    _, reader = runs
    cards = defaultdict(set)
    for tag in reader.PluginRunToTagToContent("scalars")["version_1"]:
        cards[tag.partition("/")[0]].add(tag)
    assert not {tag for group in ("cliff", "rollout", "privileged") for tag in cards[group] if tag.count("/") > 1}
    for group in ("cliff", "rollout"):
        assert {tag.split("/")[2] for tag in cards[f"{group}_by_source"]} <= {f"tier{i}" for i in (1, 2, 3, 4, 6)}
        assert {f"{group}/{tag.split('/')[1]}" for tag in cards[f"{group}_by_source"]} <= cards[group]
    assert len(cards["cliff"]) < 10
