"""Run: .venv/bin/python -m pytest tests/test_rewards.py"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewardkit import rewards
from rewardkit.errors import DataError, ModelError, OptionError
from rewardkit.rewards.coherent import Coherent
from rewardkit.rubrics import rubric
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random models with one tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    return tiny.llama(folder / "sft", seed=1), tiny.llama(folder / "base", seed=2)


SAMPLES = [
    {"prompt": "What is 2 + 2?", "response": "It is 4."},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], "response": "Hi"},
    {"prompt": "What is 2 + 2?", "response": "x" * 90, "finish_reason": "length"},
    {"prompt": "Say nothing.", "response": ""},
]


def coherent(pair, **options):
    return Coherent(str(pair[0]), str(pair[1]), **options)


def reference(model, ids, start):
    """log p of ids[start:] by one unbatched fp32 forward pass over the whole sequence."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logp = net(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]


def test_scores_equal_an_unbatched_reference(pair):
    """SPEC F.2: token rewards add up to the sequence reward, which is the difference of the two log-probabilities."""
    words = tiny.tokenizer()
    for sample, score in zip(SAMPLES, coherent(pair, tokens=True)(SAMPLES), strict=True):
        messages = [{"role": "user", "content": sample["prompt"]}] if isinstance(sample["prompt"], str) else sample["prompt"]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        response = words(sample["response"])["input_ids"] + ([] if "finish_reason" in sample else [words.eos_token_id])
        policy, base = (reference(m, prompt + response, len(prompt)) for m in pair)
        assert score.extra["token_rewards"] == pytest.approx([p - b for p, b in zip(policy, base, strict=True)], abs=1e-4)
        assert score.value == pytest.approx(sum(policy) - sum(base), abs=1e-3)
        assert score.value == pytest.approx(score.extra["logp_policy"] - score.extra["logp_base"], abs=1e-4)
        assert score.extra["score_mean"] == pytest.approx(score.value / len(response), abs=1e-6)
        assert score.extra["n_tokens"] == len(response)
        assert score.extra["has_eos"] == ("finish_reason" not in sample) and score.extra["truncated"] == (
            "finish_reason" in sample
        )


def test_identical_models_give_exactly_zero_and_swapped_ones_the_negative(pair):
    """SPEC F.1 and F.3."""
    for score in coherent((pair[0], pair[0]), tokens=True)(SAMPLES):
        assert score.value == 0.0 and not any(score.extra["token_rewards"])
    forth, back = coherent(pair)(SAMPLES), coherent(pair[::-1])(SAMPLES)
    assert [s.value for s in forth] == [-s.value for s in back]


def test_batch_size_and_order_do_not_matter(pair):
    """SPEC F.7."""
    whole = [s.value for s in coherent(pair)(SAMPLES)]
    assert [s.value for s in coherent(pair, batch_tokens=1)(SAMPLES)] == pytest.approx(whole, abs=1e-4)
    assert [s.value for s in coherent(pair)(SAMPLES[::-1])][::-1] == pytest.approx(whole, abs=1e-4)


def test_token_ids_win_over_text_and_missing_eos_is_a_choice(pair):
    words = tiny.tokenizer()
    cut = {"prompt": "Count", "response": "ignored", "token_ids": words("1 2 3")["input_ids"], "finish_reason": "length"}
    full = cut | {"token_ids": [*cut["token_ids"], words.eos_token_id], "finish_reason": "stop"}
    assert coherent(pair)([cut])[0].extra["n_tokens"] == 5
    assert coherent(pair, missing_eos="append")([cut])[0].value == pytest.approx(coherent(pair)([full])[0].value, abs=1e-5)
    dropped = coherent(pair, missing_eos="drop")([cut, full])
    assert dropped[0].value is None and "no end token" in dropped[0].why and dropped[1].value is not None


def test_what_cannot_be_scored_is_none_with_a_reason(pair):
    bad = [{"prompt": "a", "response": None}, {"prompt": "a" * 300, "response": "b"}, SAMPLES[0], {"prompt": 7, "response": "b"}]
    scores = rewards.apply(coherent(pair), bad)
    assert [s.value is None for s in scores] == [True, True, False, True]
    assert [s.why.split(";")[0] for s in scores[:2]] == ["there is no response", "prompt and response have 304 tokens"]
    assert scores[1].extra.keys() == scores[2].extra.keys() and "a prompt is text or a list" in scores[3].why


def test_models_that_see_other_ids_are_refused(pair, tmp_path):
    other = tiny.llama(tmp_path / "other", template=tiny.TEMPLATE.replace("<|{{", "[{{"))
    with pytest.raises(ModelError, match="differ in their chat template"):
        coherent((pair[0], other)).load()
    bare = tiny.llama(tmp_path / "bare", template=None)
    coherent((pair[0], bare)).load()
    config = json.loads((bare / "tokenizer.json").read_text())
    config["model"]["vocab"]["a"], config["model"]["vocab"]["b"] = config["model"]["vocab"]["b"], config["model"]["vocab"]["a"]
    (bare / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="differ in their vocabulary"):
        coherent((pair[0], bare)).load()


@pytest.mark.parametrize(
    ("answer", "last", "first"),
    [
        ("Because.\nScore: 4", 4.0, 4.0),
        ("score: 3.5/5", 3.5, 3.5),
        ("Score: 2 ... Score: 5", 5.0, 2.0),
        ("**Score:** 3", 3.0, 3.0),
        ("Score: 7", None, None),
        ("Score: 55", None, None),
        ("Score: -1", None, None),
        ("Score: 4/10", None, None),
        ("Score: four", None, None),
        ("", None, None),
    ],
)
def test_judge_answers_parse_by_spec_c3(answer, last, first):
    """SPEC C.3 and F.23: a full number in range; the last score line for SRLM, the first for SER."""
    assert rubric("additive5").parse(answer) == last
    assert rubric("ser").parse(answer) == first


@given(st.text(), st.text())
def test_texts_reach_the_judge_untouched(prompt, response):
    filled = rubric("additive5").fill(prompt, response)
    before, _, rest = rubric("additive5").text.partition("{prompt}")
    middle, _, after = rest.partition("{response}")
    assert filled == before + prompt + middle + response + after


def test_judge_averages_votes_and_never_guesses(tmp_path):
    replies = tmp_path / "replies.jsonl"
    asked = rubric("additive5").fill(SAMPLES[0]["prompt"], SAMPLES[0]["response"])
    replies.write_text(json.dumps({"prompt": asked, "replies": ["Score: 4", "no idea", "Score: 3"]}) + "\n")
    judge, _ = rewards.load(f"judge model=scripted votes=3 engine='scripted file={replies}'")
    score = rewards.apply(judge, [SAMPLES[0], {"prompt": "p", "response": None}, SAMPLES[1]])
    assert score[0].value == 3.5 and score[0].extra["votes"] == [4.0, None, 3.0]
    assert score[0].extra["raw"] == ["Score: 4", "no idea", "Score: 3"]
    assert score[0].extra["spread"] == 0.5 and score[0].extra["n_valid"] == 2
    assert score[1].value is None and score[1].why == "there is no response"
    assert score[2].value is None and "the judge did not answer: the script has no reply" in score[2].why
    strict, _ = rewards.load(f"judge model=scripted votes=3 min_valid=3 engine='scripted file={replies}'")
    assert strict(SAMPLES[:1])[0].value is None and "2 of 3 votes" in strict(SAMPLES[:1])[0].why


def test_text_rewards():
    texts = [("The answer is 1,234.50", "#### 1234.5"), ("none", "7"), (None, "7")]
    rows = [{"prompt": "q", "response": r, "answer": a} for r, a in texts]

    def values(spec):
        return [s.value for s in rewards.apply(rewards.load(spec)[0], rows)]

    value = {k: values(f"text kind={k}") for k in ("length", "numeric", "exact")}
    assert value == {"length": [22.0, 4.0, None], "numeric": [1.0, 0.0, None], "exact": [0.0, 0.0, None]}
    assert values("text kind=regex pattern='^The'") == [1.0, 0.0, None]
    assert values("text kind=length unit=words") == [4.0, 1.0, None]
    with pytest.raises(OptionError, match="needs pattern"):
        rewards.load("text kind=regex")


def test_a_plain_function_is_a_reward(tmp_path):
    code = "def half(samples, by=2):\n    return [len(s['response']) / by if s['response'] else None for s in samples]\n"
    (tmp_path / "mine.py").write_text(code)
    reward, prefix = rewards.load(f"{tmp_path}/mine.py:half by=4 as=quarter")
    scores = rewards.apply(reward, [{"prompt": "q", "response": "abcd"}, {"prompt": "q", "response": ""}])
    assert prefix == "quarter" and scores[0].value == 1.0 and scores[1].value is None and scores[1].why
    assert rewards.apply(lambda rows: [float("nan")], SAMPLES[:1])[0].value is None
    with pytest.raises(DataError, match="1 scores for 2 samples"):
        rewards.apply(lambda rows: [1.0], SAMPLES[:2])


def adapter(folder, base, seed, name=None):
    """A LoRA adapter on `base` that changes what it says; the folder."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_an_adapter_and_its_base_are_one_set_of_weights(pair, tmp_path):
    """Adapter on is the policy, adapter off the base; the numbers are those of two models loaded apart."""
    from rewardkit.logprobs import LogProbs

    one, other = adapter(tmp_path / "one", pair[1], 1), adapter(tmp_path / "other", pair[1], 2)
    apart = [LogProbs(str(m)) for m in (one, other, pair[1])]
    for names, (first, second) in {(one, pair[1]): (0, 2), (one, other): (0, 1), (pair[1], other): (2, 1)}.items():
        reward = coherent(names)
        scores = reward(SAMPLES)
        encoded = [reward._encode(s)[:2] for s in SAMPLES]
        wanted = [sum(map(sum, zip(apart[first]([e])[0], [-x for x in apart[second]([e])[0]]))) for e in encoded]  # noqa: B905
        assert reward.about["one_backbone"] and [s.value for s in scores] == pytest.approx(wanted, abs=1e-3)
        size = sum(p.numel() for p in apart[2].model.parameters())
        assert sum(p.numel() for p in reward._scorers[0].model.parameters()) < 1.5 * size
        assert reward._scorers[0].model is reward._scorers[1].model
    assert coherent((one, pair[1])).backbone(str(pair[1])) is None


def test_switching_adapters_leaves_everything_as_it_was(pair, tmp_path):
    from rewardkit.models import load_causal, wearing

    model = load_causal(str(pair[1]), adapters={"a": str(adapter(tmp_path / "a", pair[1], 1))})
    ids = torch.tensor([[5, 6, 7]])
    trained = {n for n, p in model.named_parameters() if "lora_A" in n}
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)
    with torch.no_grad():
        on = model(ids).logits
        with wearing(model, None):
            off = model(ids).logits
            with wearing(model, "a"):
                assert torch.equal(model(ids).logits, on)
            assert torch.equal(model(ids).logits, off) and not torch.equal(on, off)
        assert torch.equal(model(ids).logits, on)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
