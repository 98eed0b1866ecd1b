"""`python -m evaluation.speech_quality answers=ANSWERS output=quality whisper_model=large-v3`

How well are answers spoken? Over the folders that inference.batch wrote: the words that Whisper hears against
Moshi's inner monologue, the voice against its own beginning, and who speaks when. Needs the packages of
`pip install 'moshi-ttt[quality]'` and, for the voice, the weights of resemblyzer; what is missing is said.
"""

import logging
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.typed import typed_config
from evaluation.speech_quality.answers import find_answers
from evaluation.speech_quality.listening import Heard, Listener
from evaluation.speech_quality.results import write_results
from evaluation.speech_quality.settings import SpeechQualityConfig

logger = logging.getLogger(__name__)


def run(config: SpeechQualityConfig) -> Path:
    """Listen to all answers and write what was heard. Returns the results file.

    Raises:
        ValueError: what is wrong with the settings or the answers, or which model is missing.
    """
    config.validate()
    answers = find_answers(config.answers, config.limit, config.seed)
    seconds = sum(item.seconds for item in answers.items)
    told = f" PARTIAL: {answers.partial}" if answers.partial else ""
    logger.info(
        "%d answers, %.2f h, by %s, step %s.%s",
        *(len(answers.items), seconds / 3600, answers.model["checkpoint"], answers.model["step"], told),
    )
    listener = Listener(config)
    heard: list[Heard] = []
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}, {rate_fmt} real time]"
    bar = tqdm(total=seconds, desc="listening", unit="x", disable=None, bar_format=layout)
    with bar, logging_redirect_tqdm():
        for item in answers.items:
            heard.append(listener.listen(item))
            bar.update(item.seconds)
    table, written = write_results(config, answers, listener, heard)
    logger.info("%s\n\nwrote %s", table, "\n      ".join(map(str, written)))
    return written[-1]


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="speech_quality")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("faster_whisper").setLevel(logging.WARNING)
    torch.set_grad_enabled(False)
    run(typed_config(config, SpeechQualityConfig))


if __name__ == "__main__":
    main()
