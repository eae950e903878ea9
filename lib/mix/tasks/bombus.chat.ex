defmodule Mix.Tasks.Bombus.Chat do
  @shortdoc "Talks with a model, in the terminal"

  @moduledoc """
  Talks with a model in the terminal. The model sees what was said before.

      mix bombus.chat
      mix bombus.chat --model mlx-community/Qwen3-0.6B-4bit --adapter mine=adapters/my-posts
      mix bombus.chat --system "You answer in one sentence." --temperature 0.7

  Ctrl-C stops an answer, Ctrl-D ends. A line that begins with a slash is a command:

    * `/adapter NAME` - answers with an adapter from now on: one that `--adapter` has named, one of the
      demo model's, a folder or a Hub id. `/adapter none` answers without one, `/adapter` lists them
    * `/system TEXT` - what the model is told first; without a text, nothing
    * `/reset` - forgets the conversation
    * `/help`, `/quit`

  Where the standard input is no terminal, each of its lines is a turn. Then only the answers are
  written, and the exit status is 1 if one has failed.

  ## Options

    * `--model` - a folder in MLX's format, a Hub id (`owner/name`), or `demo`, the model that ships with
      Bombus (default). Its tokenizer must have a chat template
    * `--tokenizer` - a folder with `tokenizer.json`, or a Hub id; the model's by default
    * `--adapter` - a folder with a LoRA adapter, a Hub id, or the name of one of the demo model's;
      `name=folder` gives it a name. May be given more than once: the first is used at first
    * `--scale` - takes the place of the scale of these adapters
    * `--system` - what the model is told first
    * `--device` - `auto` (default), `gpu` or `cpu`
    * `--max-new-tokens` - of an answer, 1024 by default
    * `--temperature`, `--top-k`, `--top-p`, `--min-p`, `--repetition-penalty`, `--seed`, `--stop` - as
      in `Bombus.Serving`
    * `--no-thinking` - tells the chat template not to let the model think (`enable_thinking: false`)
    * `--template-option name=value` - another option of the chat template; the value is JSON or a text.
      May be given more than once
  """

  use Mix.Task

  alias Mix.Bombus.{CommandLine, Conversation, Generation, Terminal}

  @switches Keyword.delete(Generation.switches(), :adapter) ++ [adapter: :keep, system: :string]

  @impl true
  def run(arguments), do: CommandLine.run("bombus.chat", arguments, @switches, &chat/2)

  defp chat(options, []) do
    Generation.check!(options)
    Mix.Task.run("app.start")
    model_word = options[:model] || "demo"
    serving = Generation.serving!(Keyword.put_new(options, :max_new_tokens, 1024))

    unless serving.tokenizer.chat_template? do
      Mix.raise("the tokenizer of #{model_word} has no chat template: see mix bombus.generate")
    end

    adapters = adapters(options, model_word)

    conversation = %Conversation{
      serving: serving,
      model_word: model_word,
      system: options[:system],
      adapters: Map.new(adapters),
      adapter: with([{name, _adapter} | _rest] <- adapters, do: name, else: (_none -> nil)),
      terminal?: Terminal.terminal?()
    }

    if conversation.terminal?, do: IO.puts(welcome(serving, model_word))
    unless Conversation.talk(conversation), do: exit({:shutdown, 1})
  end

  defp chat(_options, [word | _rest]) do
    Mix.raise("expected only options, got: #{word} (mix bombus.generate takes a prompt)")
  end

  # In their order, by name.
  defp adapters(options, model_word) do
    for word <- Keyword.get_values(options, :adapter) do
      {name, word} = Generation.named(word)
      source = Generation.adapter_source(word, model_word)
      {name, Bombus.load_adapter!(source, Keyword.take(options, [:scale]))}
    end
  end

  defp welcome(serving, model_word) do
    device = serving.model.device |> inspect() |> String.trim_leading(":")
    "#{model_word} on #{device}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."
  end
end
