"""The typed config of a data set."""

from dataclasses import asdict, dataclass

from omegaconf import MISSING

from finetune.data.bad_input import ON_ERROR
from finetune.data.interleaver import TextLayout
from finetune.data.sources import USER_CHANNELS, SourceSettings


@dataclass
class DataConfig:
    """Where recordings are and how they become streams: Kyutai's stereo format, one voice alone, or prepared
    folders."""

    train: str = MISSING
    """A .jsonl or .jsonl.gz of the training recordings, a folder of them, or several with weights:
    "a.jsonl:0.7,folder:0.3". Lines are {"path": ..., "duration": seconds}. The audio is stereo, left Moshi
    and right the user; NAME.json beside it holds the timed words. mono:FOLDER and mono:LIST.jsonl are
    recordings of one voice, which Moshi learns, without words: Libri-Light's folders or any others. Or a
    folder that `python -m finetune.data.prepare` wrote."""

    valid: str | None = None
    """Held-out recordings for the validation loss, named in the same way; weights say nothing here. None
    validates nothing."""

    root: str | None = None
    """Folder that all audio must lie in. None is the folder of each jsonl, or the folder that is named."""

    user_channel: str = "silence"
    """The user of mono recordings: silence or noise."""

    user_noise_dbfs: float = -60.0
    """Level of that noise (white, RMS) in dB of full scale. It is the same in every run."""

    check_files: bool = True
    """Open every file before the run starts. False believes the lists, for many files: a broken one shows
    when it is first used."""

    on_error: str = "raise"
    """What a recording that cannot be used does. raise: it stops the run. skip: it is logged, counted and
    left out; where that shows during training, nothing is learnt from its place in the batch."""

    max_error_fraction: float = 0.01
    """With on_error=skip, the run stops when a larger share of the recordings cannot be used."""

    encode: str | None = None
    """How audio becomes codes. whole: a recording is streamed through Mimi from its start, and clips are cut
    from its codes. per_clip: each crop is encoded by itself, as moshi-finetune does. None is whole with
    ttt.persistent_states=true, which needs it, and per_clip otherwise. Codes of both never mix."""

    workers: int = 2
    """Threads that read prepared data ahead; 0 reads when it is asked for. The order is the same with any
    number. Audio that was not prepared is encoded when it is asked for."""

    shuffle: bool = True
    """Draw clips in a new seeded order every epoch."""

    keep_main_only: bool = True
    """Put only the main speaker's words on the text stream, as moshi-finetune does. This and the following
    are the options of its interleaver, with its defaults."""

    main_speaker: str = "SPEAKER_MAIN"
    """The main speaker's label in the alignments."""

    use_bos_eos: bool = False
    """With keep_main_only=false: BOS where the main speaker takes the turn, EOS where another takes it."""

    keep_and_shift: bool = False
    """Say words to their ends, however late; otherwise the next word cuts what is left of one."""

    audio_delay_sec: float = 0.0
    """How much later the audio is than the text; below 0 the text is later."""

    in_word_padding: int | None = None
    """Text token of frames in which a word still lasts when all its tokens are placed. None is padding."""

    @property
    def sources(self) -> SourceSettings:
        """How the sources are read."""
        return SourceSettings(self.root, self.check_files, self.user_channel, self.user_noise_dbfs)

    @property
    def layout(self) -> TextLayout:
        """How words go on the text stream."""
        return TextLayout.of(asdict(self))

    def validate(self) -> None:
        """Raise ValueError for settings that cannot work."""
        if self.on_error not in ON_ERROR:
            raise ValueError(f"data.on_error must be raise or skip; got {self.on_error!r}")
        if not 0 <= self.max_error_fraction < 1:
            raise ValueError(
                f"data.max_error_fraction must be at least 0 and below 1, got {self.max_error_fraction}"
            )
        if self.user_channel not in USER_CHANNELS:
            raise ValueError(f"data.user_channel must be silence or noise; got {self.user_channel!r}")
        if not self.user_noise_dbfs <= 0:
            raise ValueError(
                f"data.user_noise_dbfs is in dB of full scale: at most 0; got {self.user_noise_dbfs}"
            )
        self.layout.validate()
