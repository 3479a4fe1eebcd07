"""`vllm-batch completion`: tab completion for shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      eval "$(vllm-batch completion bash)"      # in ~/.bashrc
      eval "$(vllm-batch completion zsh)"       # in ~/.zshrc, after compinit
      vllm-batch completion fish > ~/.config/fish/completions/vllm-batch.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(context.find_root().command, {}, "vllm-batch", "_VLLM_BATCH_COMPLETE").source())
