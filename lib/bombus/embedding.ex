defmodule Bombus.Embedding do
  @moduledoc false
  # What a model gives for texts: `Bombus.embed/4`, and what `Bombus.rerank/5` shares with it.

  alias Bombus.{Adapter, Error, Model, Native, Options, Tensor}

  @request [
    adapter: [type: {:handle, Adapter}, doc: "an adapter to compute with", by_default: "none"],
    timeout: [
      type: {:or, [{:in, [:infinity]}, {:integer, 0..0xFFFFFFFF}]},
      type_spec: quote(do: timeout()),
      expected: "milliseconds, :infinity or nil",
      by_default: "none",
      doc: "after how many milliseconds the call ends with the error `:timeout`"
    ]
  ]
  @schema [
            pooling: [
              type: {:in, [:last, :mean]},
              default: :last,
              doc: """
              which hidden state stands for a text: that of its `:last` token, as Qwen3-Embedding was
              trained, or the `:mean` of those of all tokens
              """
            ],
            normalize: [
              type: :boolean,
              default: true,
              doc:
                "`true` divides a vector by its length, so that a dot product of two is their cosine"
            ],
            dimensions: [
              type: {:integer, 1..0x7FFFFFFF},
              by_default: "all, `model.spec.hidden_size`",
              doc: "takes the first so many numbers of a vector, before it is normalized"
            ],
            instruction: [
              type: :string,
              by_default: "none",
              doc: """
              what the texts are asked for, in a sentence: each goes in as
              `Instruct: {instruction}\\nQuery:{text}`, as Qwen3-Embedding takes queries. Its documents
              have none
              """
            ]
          ] ++ @request

  def schema, do: @schema

  @doc "The options of all requests that are no servings'."
  def request_options, do: @request

  @doc "The options, checked; `what` is the function that takes them."
  def options!(options, model, what) do
    options = Options.validate!(options, @schema, what)
    %{spec: %{hidden_size: hidden}} = Options.handle!(model, Model)

    if options[:dimensions] != nil and options[:dimensions] > hidden do
      raise ArgumentError,
            "expected :dimensions to be in 1..#{hidden}, the model's `hidden_size`, " <>
              "got: #{options[:dimensions]}"
    end

    options
  end

  @doc "Raises where it is no list of strings; `what` are they called."
  def texts!(texts, what) do
    unless Options.proper_list?(texts) and Enum.all?(texts, &is_binary/1) do
      raise ArgumentError, "expected #{what} to be a list of strings, got: #{Options.show(texts)}"
    end

    texts
  end

  @doc "A vector `{dimensions}` of numbers `{:f, 32}` for each text. Options are as `options!/3` gives them."
  def run(model, tokenizer, texts, options) do
    wanted = {:embedding, options[:pooling], options[:normalize], options[:dimensions]}

    with :ok <- check_utf8(texts, "text"),
         texts = for(text <- texts, do: instruct(text, options[:instruction])),
         {:ok, vectors} <- ask(model, tokenizer, texts, wanted, options) do
      {:ok, for(vector <- vectors, do: Tensor.new({:f, 32}, {div(byte_size(vector), 4)}, vector))}
    end
  end

  # Source: the model card of Qwen3-Embedding, `get_detailed_instruct`.
  defp instruct(text, nil), do: text
  defp instruct(text, instruction), do: "Instruct: #{instruction}\nQuery:#{text}"

  @doc "What the engine gives for each text."
  def ask(_model, _tokenizer, [], _wanted, _options), do: {:ok, []}

  def ask(model, tokenizer, texts, wanted, options) do
    adapter = options[:adapter] && options[:adapter].ref
    timeout = if options[:timeout] != :infinity, do: options[:timeout]
    embed = &Native.embed(model.ref, tokenizer.ref, adapter, texts, wanted, timeout, &1)

    case Native.await(embed, &Native.cancel/1) do
      {:error, error} -> {:error, error}
      {_kind, given} -> {:ok, given}
    end
  end

  @doc "An error where one of some texts is not UTF-8; `what` is one of them called."
  def check_utf8(texts, what) do
    case Enum.find_index(texts, &(not String.valid?(&1))) do
      nil -> :ok
      place -> not_utf8("#{what} #{place + 1} of #{length(texts)}", Enum.at(texts, place))
    end
  end

  def not_utf8(name, text),
    do: Error.error(:bad_request, "#{name}: expected UTF-8, got: #{Options.show(text)}")
end
