"""The command `pmd tokenizer`, which learns a vocabulary from texts."""

from typing import Annotated

import typer

from pmd_pipeline.cli.app import app, make_reporter, say
from pmd_pipeline.cli.options import Quiet


@app.command()
def tokenizer(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="A manifest with texts.")],
    size: Annotated[
        int,
        typer.Option(min=100, max=1_000_000, metavar="N", help="Size of the vocabulary."),
    ] = 30522,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The vocab.txt to write.")
    ] = "vocab.txt",
    quiet: Quiet = False,
) -> None:
    """Learn an uncased WordPiece vocabulary, like that of BERT, from the texts of a manifest.

    Example: pmd tokenizer manifests/pmd.json --size 30522 --out vocab.txt
    """
    from pmd_pipeline.contract.files import write_whole
    from pmd_pipeline.text.vocabulary import learn_vocabulary

    with make_reporter(quiet=quiet).stage("tokenizer", "texts") as stage:
        vocabulary, max_error = learn_vocabulary(manifest, size, stage.update)
    write_whole(out, vocabulary.content)
    if max_error:
        say(f"words that occur at most {max_error} times may be missing: there are too many words")
    if len(vocabulary.tokens) < size:
        say(f"{len(vocabulary.tokens):,} tokens: no further pair of tokens occurs twice")
    typer.echo(f"{out}  {vocabulary.sha256}")
