"""desc: decoupled preference optimisation for emotional-support conversation, in plain PyTorch.

The ground, under the method because that must read files and find models
    storage/      whole files, journal, checkpoints, PEFT's adapter format, the two small models;
                  imports nothing else of desc

The method, in reading order; each file imports only those above it
    domain        a kind of dialogue, as a value: strategies, speakers, instructions, errors
    esconv        dialogues and their splits
    prompts       (task, dialogue, turn) -> messages and completion
    templates     how a chat template renders a conversation
    encoding      messages -> token ids
    tree          token sequences -> a forest of prefix trees, packed under a token budget
    attention     attention over the tree: FlexAttention on a GPU, blockwise on a CPU
    forward       the one forward pass, and the log-probabilities of a forest's sequences
    exactness     the proof, on the model at hand, that a tree is exact
    modeling      loading a model, and refusing one whose files are not whole
    lora          adapters: the layer, switching, stacking, merging
    losses        SFT, DPO, IPO, SimPO and KTO, pure functions of log-probabilities
    sampling      exact distributions over strategies; replies that grow on the tree
    pairs         preferences, in pairs or as single answers, and the files that hold them
    mining        answer, annotate, route: from errors to preference pairs
    metrics       preference bias B, Q, and intervals
    calibration   a planner's offsets, with which it uses strategies as often as people do

The wings; they import the method, never the reverse
    training/     batches, objectives, the run and its optimizer, validation, ranks, sharding, the
                  memory estimate
    judging/      annotator, judge, the endpoint that both may ask, agreement with people, and the
                  tables that people fill in
    evaluation/   systems, scores, tables, text overlap, the report page and its figures;
                  imports judging, too
    chat/         python -m desc.chat

flags and cli serve the scripts: the command line; dtype, progress and errors. flags imports the
method, and cli both; every wing may use them. training/ranks imports nothing, and all but the
method and storage may use it. tests/test_architecture.py holds this map.
"""

__version__ = "0.1.0"


class DescError(Exception):
    """Something that the user can mend. Its one-line message says what to do, and scripts print it
    without a traceback."""
