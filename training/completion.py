"""What --completion prints: a script with which bash and zsh complete flags, presets and choices."""

from __future__ import annotations

from typing import Any

SCRIPT = """\
# bash: source <(python3 dreamer.py --completion)
# zsh: autoload -Uz bashcompinit && bashcompinit, then the same
_dreamer() {{
  local at flag= words= word=${{COMP_WORDS[COMP_CWORD]}} place=0
  for ((at = 1; at < COMP_CWORD; at++)); do
    [[ ${{COMP_WORDS[at]}} == *dreamer.py ]] && place=$at
    [[ ${{COMP_WORDS[at]}} == --* ]] && flag=${{COMP_WORDS[at]}}
  done
  COMPREPLY=()
  [[ $place == 0 && ${{COMP_WORDS[0]}} != *dreamer.py ]] && return
  case $flag in
{cases}
  esac
  [[ $word == -* || -z $flag ]] && words="{flags}"
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _dreamer dreamer.py python python3"""
OWN = ("configs", "presets", "config", "help", "completion")  # flags that are no keys


def completion(schema: Any) -> str:
    """Return the script of a schema (config.Schema). Where it has nothing to offer, files are completed."""
    choices = {"configs": list(schema.presets)}
    for name, key in schema.keys.items():
        listed = [str(choice) for choice in key.choices or ()]
        choices[name] = ["true", "false"] if isinstance(key.default, bool) else listed
    cases = [f'    --{name}) words="{" ".join(found)}" ;;' for name, found in choices.items() if found]
    return SCRIPT.format(cases="\n".join(cases), flags=" ".join(f"--{name}" for name in (*OWN, *schema.keys)))
