"""`python -m inference.batch checkpoint=RUN 'inputs=[recordings/*.wav]' output=answers`"""

import logging
import sys

import hydra
from omegaconf import DictConfig

from configs.typed import typed_config
from inference.batch.settings import BatchConfig
from inference.batch.work import Batch

SOME_FAILED = 3


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="batch")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    batch = Batch(typed_config(config, BatchConfig))
    batch.run()
    if batch.failures:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()
