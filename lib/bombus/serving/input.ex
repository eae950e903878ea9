defmodule Bombus.Serving.Input do
  @moduledoc false
  # What a request begins with: a string, or a map with :text, :messages or :token_ids and the
  # request's options beside it.

  alias Bombus.{Error, Model, Serving, Tokenizer}
  alias Bombus.Serving.Options
  alias Bombus.Tokenizer.Messages

  @typedoc "What the NIF takes for a prompt, and the request's options."
  @type t :: {tuple(), map()}

  @prompts [
    text: [doc: "a user's message, or a text to be completed"],
    messages: [doc: "a conversation"],
    token_ids: [doc: "token ids as they are"]
  ]

  @doc """
  An input as `{prompt, options}` for the NIF, or the error of a text that is none. Raises for what
  the caller's code got wrong.
  """
  @spec normalize!(term(), Serving.t()) :: {:ok, t()} | {:error, Error.t()}
  def normalize!(text, serving) when is_binary(text) do
    normalize!(%{text: text}, serving)
  end

  def normalize!(input, serving) when is_non_struct_map(input) do
    {prompt, options} = input |> named!() |> Map.split(Keyword.keys(@prompts))
    options = Options.merge!(serving.options, options)
    check_options!(options, serving)

    case Map.to_list(prompt) do
      [one] -> with {:ok, prompt} <- prompt!(one, options, serving), do: {:ok, {prompt, options}}
      _none_or_several -> raise ArgumentError, expected(input)
    end
  end

  def normalize!(other, _serving), do: raise(ArgumentError, expected(other) <> hint(other))

  @doc "Whether the answer to an input that was checked is a stream."
  @spec stream?(Serving.input(), Serving.t()) :: boolean()
  def stream?(%{"stream" => stream?}, _serving), do: stream?
  def stream?(%{stream: stream?}, _serving), do: stream?
  def stream?(_input, serving), do: serving.options.stream

  # Names may be strings, as in a map that was JSON.
  defp named!(input) do
    names = Map.new(@prompts ++ Options.schema(), fn {key, _entry} -> {to_string(key), key} end)
    named = Map.new(input, fn {key, value} -> {Map.get(names, key, key), value} end)
    Bombus.Options.known!(Map.keys(named), @prompts ++ Options.schema(), "an input")

    if map_size(named) < map_size(input) do
      raise ArgumentError, "expected every name once, as an atom or a string, got: #{show(input)}"
    end

    named
  end

  @doc "Raises for options that do not go with the model or the tokenizer."
  def check_options!(options, serving) do
    stop!(options, serving)
    biases!(options, serving)
    adapter!(options.adapter, serving.model)
  end

  defp stop!(%{stop: stops}, serving) do
    {ids, strings} = Enum.split_with(stops, &is_integer/1)

    if strings != [] and serving.tokenizer == nil do
      raise ArgumentError,
            "a serving without a tokenizer has no text for :stop, only token ids, " <>
              "got: #{show(strings)}"
    end

    if (match?([_one, _other | _], ids) and serving.tokenizer) && List.ascii_printable?(ids) do
      raise ArgumentError,
            "expected :stop to be strings or token ids, got: #{show(ids)} (a charlist: write a " <>
              "string, #{inspect(List.to_string(ids))}; tokens of these ids are written as strings too)"
    end

    if ids != [], do: Model.token_ids!(serving.model, ids), else: :ok
  end

  defp biases!(%{logit_bias: biases}, _serving) when biases == %{}, do: :ok

  defp biases!(%{logit_bias: biases}, serving),
    do: Model.token_ids!(serving.model, Map.keys(biases))

  @doc "Raises where an adapter is on another node than the model."
  @spec adapter!(Bombus.Adapter.t() | nil, Model.t()) :: :ok
  def adapter!(nil, _model), do: :ok
  def adapter!(%{ref: own}, %{ref: model}) when node(own) == node(model), do: :ok

  def adapter!(%{ref: own}, %{ref: model}) do
    raise ArgumentError,
          "expected an adapter of the model's node: the model is on #{inspect(node(model))}, " <>
            "the adapter was loaded on #{inspect(node(own))}"
  end

  defp prompt!({:token_ids, ids}, _options, serving) do
    {:ok, {:ids, Model.token_ids!(serving.model, ids)}}
  end

  defp prompt!({kind, _value}, _options, %{tokenizer: nil}) do
    raise ArgumentError,
          "a serving without a tokenizer takes :token_ids only, got: #{inspect(kind)}"
  end

  defp prompt!({:text, text}, options, serving) do
    with {:ok, text} <- text(text) do
      if options.chat_template and serving.tokenizer.chat_template?,
        do: chat([%{role: "user", content: text}], options, serving.tokenizer),
        else: {:ok, {:text, text}}
    end
  end

  defp prompt!({:messages, messages}, options, %{tokenizer: tokenizer}) do
    unless options.chat_template and match?(%Tokenizer{chat_template?: true}, tokenizer) do
      raise ArgumentError, "expected :text, since :messages need a chat template"
    end

    chat(messages, options, tokenizer)
  end

  defp chat(messages, options, tokenizer) do
    Messages.prompt(messages, options.template_options, tokenizer)
  end

  # A visitor may have typed it.
  defp text(""), do: Error.error(:bad_request, "expected a text that is not empty")

  defp text(text) when is_binary(text) do
    if String.valid?(text), do: {:ok, text}, else: bad_text(text)
  end

  defp text(other) do
    raise ArgumentError, "expected :text to be a string, got: #{show(other)}" <> charlist(other)
  end

  defp bad_text(text) do
    Error.error(:bad_request, "expected a text in UTF-8, got: #{show(text)}")
  end

  defp expected(input) do
    "expected an input to be a string, or a map with exactly one of :text, :messages and " <>
      ":token_ids, got: #{show(input)}"
  end

  defp hint([{key, _value} | _] = list) when is_atom(key) do
    if Keyword.keyword?(list), do: " (a keyword list: write %{#{key}: ...})", else: ""
  end

  defp hint(other), do: charlist(other)

  defp charlist([first | _] = list) when is_integer(first) do
    if List.ascii_printable?(list, 50),
      do: " (a charlist: write a string, \"...\")",
      else: " (for token ids write %{token_ids: ids})"
  end

  defp charlist(_other), do: ""

  @doc "Raises what is said of a list that is none of inputs: a charlist, options, token ids."
  @spec list!(list()) :: list()
  def list!(inputs) do
    if List.improper?(inputs) or match?([first | _] when is_integer(first), inputs) or
         (inputs != [] and Keyword.keyword?(inputs)),
       do: raise(ArgumentError, expected(inputs) <> hint(inputs)),
       else: inputs
  end

  defp show(term), do: Bombus.Options.show(term)
end
