"""The plug-in of lmms-eval through lmms-eval itself, on a task of our own; skipped where lmms-eval is not installed."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.models.registry_v2 import ModelRegistryV2  # noqa: E402
from PIL import Image  # noqa: E402

from modeling_omni.lmms_eval_plugin import manifest, our_messages  # noqa: E402

MEDIA = Path(__file__).parent.parent / "modeling_omni/nano/examples"


def test_the_entry_point_gives_a_chat_model():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.resolve("nemotron_omni").model_type == "chat"
    assert registry.get_model_class("omni").__name__ == "Omni"
    assert get_model("omni") is registry.get_model_class("omni")  # found by lmms-eval without us: installed


def test_answers_in_order_and_errors_apart():
    lm = get_model("omni").create_from_arg_string("pretrained=nano,batch_size=2", {"device": "cpu"})
    picture, sound = Image.open(MEDIA / "shapes.png"), str(MEDIA / "digits.wav")
    docs = [
        [{"type": "image", "url": picture}, {"type": "text", "text": "Where is the red circle?"}],
        [{"type": "text", "text": "Copy: abc"}],
        [{"type": "image", "url": "nowhere.png"}, {"type": "text", "text": "What?"}],
        [{"type": "audio", "url": sound}, {"type": "text", "text": "Which digits are spoken?"}],
        [{"type": "video", "url": str(MEDIA / "motion.mp4")}, {"type": "text", "text": "What moves where?"}],
    ]
    lm.task_dict = {"ours": {"test": docs}}
    requests = [
        Instance("generate_until", ("", lambda doc: [{"role": "user", "content": doc}], {"until": ["\n\n"],
                 "do_sample": False, "max_new_tokens": 24}, number, "ours", "test"), 0,
                 {"task": "ours", "doc_id": number, "repeats": 1})
        for number in range(len(docs))
    ]  # fmt: skip
    answers = lm.generate_until(requests)
    expected = {row["question"]: row["answer"] for row in json.loads((MEDIA / "examples.json").read_text())}
    assert answers[0].text == expected["Where is the red circle?"] and answers[1].text == "abc"
    assert answers[2].text == "" and answers[2].token_counts is None
    assert answers[3].text == expected["Which digits are spoken?"] and answers[4].text == expected["What moves where?"]
    assert answers[0].token_counts.input_tokens > answers[1].token_counts.input_tokens
    with pytest.raises(NotImplementedError):
        lm.loglikelihood(requests)


def test_messages():
    sound = {"type": "audio", "url": {"array": [0.0], "sampling_rate": 16000}}
    asked = {"role": "user", "content": [{"type": "video", "url": "a.mp4", "start_time": 1.0}, sound]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    found = our_messages([asked, said], "Be brief.")
    assert found[0] == {"role": "system", "content": "Be brief."} and found[2]["content"] == "yes"
    assert found[1]["content"] == [{"type": "video", "video": "a.mp4", "start": 1.0},
                                   {"type": "audio", "audio": ([0.0], 16000)}]  # fmt: skip
