"""lm-eval against the served example model, as a user runs it; and the paper's suites, as far as no hub is asked."""

# ruff: noqa: RUF001 - Chinese has its own punctuation

import json
import subprocess

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from examples import demo
from examples.demo import ROOT
from sere_dist.admin import AdminError, request_settings
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.evaluation.accuracy import (
    check,
    compare,
    evaluate_off_and_on,
    find_suite,
    leaf_tasks,
    open_suite,
    restore_settings,
)
from sere_dist.testing.local_cluster import free_ports

CODE = {"sere_paper": ["humaneval", "mbpp"], "sere_paper_chat": ["humaneval_instruct", "mbpp_instruct"]}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="module")
def url(cluster, artifact_path):
    with demo.served(cluster, free_ports(1)[0], artifact_path) as url:
        yield url


@pytest.fixture
def enabled(cluster, url, monkeypatch):
    """Says whether re-routing is on."""
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    with restore_settings(url):
        yield lambda: request_settings(url)["settings"]["enabled"]


def accuracy(cluster, url: str, *options: str) -> subprocess.CompletedProcess:
    command = ["sere-dist", "accuracy", url, "--suite", "examples/tiny_moe/tasks/heldout.yaml", *options]
    return cluster.run(command, cwd=ROOT, capture_output=True, text=True)


def test_off_and_on(cluster, url, enabled, tmp_path):
    results = tmp_path / "accuracy.json"
    done = accuracy(cluster, url, "--limit", "32", "--concurrency", "8", "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert "8 requests at once, S = 2" in done.stdout and "other answers" in done.stdout
    assert json.loads(results.read_text()) == json.loads(done.stdout.splitlines()[-1])
    report = json.loads(results.read_text())["tiny_moe_heldout"]
    assert report["settings"]["enabled"] and report["settings"]["rows"] == "decode" and report["concurrency"] == 8
    assert [report["runs"][way]["requests"] for way in ("off", "on")] == [32, 32]
    assert [row["metric"] for row in report["scores"]] == ["next_word", "right_words"]
    for row in report["scores"]:
        assert row["documents"] == 32 and row["other_answers"] > 0.2
        assert 0 < row["off"] < 1 and 0 < row["on"] < 1
        assert row["off_stderr"] > 0 and row["on_stderr"] > 0
        assert row["difference"] == pytest.approx(row["on"] - row["off"])
        # Both answers to a text are alike: their difference is known better than two scores of other texts would tell.
        assert 0 <= row["difference_stderr"] < (row["off_stderr"] ** 2 + row["on_stderr"] ** 2) ** 0.5
    assert enabled()


def test_the_first_token_is_not_rerouted(cluster, url, enabled):
    """Why short answers tell nothing: the prompt's own step makes the first token."""
    done = accuracy(cluster, url, "--limit", "12", "--concurrency", "1", "--gen-kwargs", '{"max_gen_toks": 1}')
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["tiny_moe_heldout"]
    assert [row["other_answers"] for row in report["scores"]] == [0, 0]
    assert "did it act at all?" in done.stderr


def test_the_settings_are_restored_after_a_failure(cluster, url, enabled):
    request_settings(url, {"enabled": False})
    done = accuracy(cluster, url, "--limit", "2", "--concurrency", "1", "--gen-kwargs", '{"max_gen_toks": 9999}')
    assert done.returncode == 1 and not done.stdout
    assert "max_model_len=512" in done.stderr and "error: 400" in done.stderr  # the server's words, and ours
    assert not enabled()
    request_settings(url, {"enabled": True})
    seen = []
    with pytest.raises(ZeroDivisionError):
        evaluate_off_and_on(url, lambda: seen.append(enabled()) or 1 / 0)
    assert seen == [False] and enabled()


def test_other_settings_meanwhile(url, enabled):
    with pytest.raises(AdminError, match="someone else changed the settings"):
        evaluate_off_and_on(url, lambda: request_settings(url, {"threshold": 0.0}) and {})
    assert enabled()


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    name, manager = open_suite(find_suite("paper"))
    assert name == "sere_paper"
    return manager


@pytest.mark.parametrize("suite", CODE)
def test_the_papers_tasks_generate(manager, suite):
    tasks = dict(leaf_tasks(manager, suite))
    parts = {"gsm8k": 1, "minerva_math": 7, "humaneval": 1, "mbpp": 1, "bbh": 27, "boolq": 1, "cmmlu": 67}
    assert {part: sum(task.startswith(part) for task in tasks) for part in parts} == parts
    assert len(tasks) == sum(parts.values())
    check(tasks, run_model_code=True)
    with pytest.raises(ValueError, match=f"{', '.join(CODE[suite])}: runs what the model writes"):
        check(tasks, run_model_code=False)


def test_tasks_that_score_the_prompt_are_refused(manager):
    for name in ("boolq", "cmmlu"):
        with pytest.raises(ValueError, match=f"{name}.*: output_type is not generate_until"):
            check(dict(leaf_tasks(manager, name)), run_model_code=False)
    with pytest.raises(ValueError, match="has no task heldout"):
        dict(leaf_tasks(manager, "heldout"))


class Says(LM):
    """Answers questions by heart."""

    def __init__(self, answers: dict[str, str]):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[request.args[0]] for request in requests]

    loglikelihood = loglikelihood_rolling = None


def test_a_groups_difference_is_of_its_documents(tmp_path):
    """Three questions of one task and two of another, of which re-routing turns one to right and one to wrong."""
    for name, questions in (("first", "abc"), ("second", "de")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"question": question} for question in questions]))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.json")}}}
        task = {"task": name, "output_type": "generate_until", "test_split": "test", "metric_list": [EXACT]}
        task |= {"doc_to_text": "{{question}}", "doc_to_target": "yes", "num_fewshot": 0}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | data))  # JSON is YAML
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(*said: str) -> dict:
        answers = dict(zip("abcde", said, strict=True))
        return lm_eval.evaluate(Says(answers), manager.load(["both"]))

    off, on = run("yes", "no", "yes", "no", "yes"), run("yes", "yes", "no", "oh no", "yes")
    (row,) = compare(off, on, "both")
    assert (row["documents"], row["off"], row["on"], row["difference"]) == (5, 0.6, 0.6, 0)
    assert row["difference_stderr"] == pytest.approx((2 / 4 / 5) ** 0.5)
    assert row["other_answers"] == 0.6
    (row,) = compare(off, on, "first")
    assert (row["documents"], row["off"], row["difference_stderr"]) == (3, pytest.approx(2 / 3), pytest.approx(3**-0.5))


QUESTIONS = {
    "boolq_cot": {"passage": "Water boils at 100 degrees.", "question": "does water boil", "label": 1},
    "cmmlu_cot": {"Question": "水在多少度沸腾？ ", "A": "10", "B": "50", "C": "100", "D": "200", "Answer": "C"},
}


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("boolq_cot", " It says so.\nAnswer: yes", True),
        ("boolq_cot", " Answer: no? It says so. **Answer:** Yes.", True),
        ("boolq_cot", " So the answer is no.", False),
        ("boolq_cot", " yes", False),
        ("cmmlu_cot", "水在一百度沸腾。\n答案：C", True),
        ("cmmlu_cot", "答案：A？不对。因此**答案是 (C)**。", True),
        ("cmmlu_cot", "答案：D", False),
        ("cmmlu_cot", "C", False),
    ],
)
def test_what_counts_as_an_answer(manager, monkeypatch, name, answer, right):
    data = Dataset.from_list([QUESTIONS[name]])
    splits = DatasetDict(dict.fromkeys(("validation", "dev", "test"), data))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: splits)
    task = next(iter(manager.load([name])["tasks"].values()))
    task.build_all_requests()
    (request,) = task.instances
    prompt, _settings = request.args
    assert all(str(part) in prompt for key, part in QUESTIONS[name].items() if key not in ("label", "Question"))
    request.resps.append(answer)
    task.apply_filters()
    assert task.process_results(task.eval_docs[0], [request.filtered_resps["last-answer"]]) == {"exact_match": right}
