"""Greedy answers of vLLM's engine without a server: a program for the Python of vLLM's environment.

    python vllm_offline.py ASKED.json ANSWERS.json

ASKED.json: a list of `{"engine": arguments of vllm.LLM, "prompts": lists of token ids, "tokens": how many}`;
ANSWERS.json: for each, the answers' token ids, or, as text, why the model does not load. Several models in
one process cost one import of vLLM.
"""

import gc
import json
import sys
from pathlib import Path


def answers(asked: dict) -> list[list[int]] | str:
    from vllm import LLM, SamplingParams

    try:
        engine = LLM(**asked["engine"])
    except Exception as error:  # what it says is what is tested
        return f"{type(error).__name__}: {error}"
    choices = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    adapter = None
    if "adapter" in asked:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, asked["adapter"])
    found = engine.generate(prompts, choices, use_tqdm=False, lora_request=adapter)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    del engine
    gc.collect()
    return tokens


def main() -> None:
    asked, told = (Path(name) for name in sys.argv[1:])
    found = []
    for one in json.loads(asked.read_text()):
        found.append(answers(one))
        told.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
