defmodule Bombus.Options do
  @moduledoc false
  # Options as tables, which check them and document them.
  #
  #     @schema [
  #       rank: [type: {:integer, 1..1024}, default: 8, doc: "the rank of the adapter"],
  #       on_progress: [type: {:function, 1}, doc: "a function that gets every event"]
  #     ]
  #
  #     options = Options.validate!(options, @schema, "MyModule.my_function/2")
  #
  # An option may have
  #
  #   * `:type` - one of `t:type/0`, anything by default
  #   * `:default` - nil by default; only an option without a default takes nil
  #   * `required: true`
  #   * `:expected` - what a message says of the value, in place of the type's words
  #   * `:doc` - what it does; an option with `doc: false` is not listed
  #   * `:by_default` - the default in words, where its value does not say enough
  #   * `:type_spec` - the quoted typespec of the value, where the type does not say enough: it stands
  #     in the docs, and in the types that `Bombus.Options.Spec` makes of a table

  alias Bombus.Handle
  alias Bombus.Hub.Token
  alias Bombus.Options.{Spec, Unknown}

  @typedoc """
  What a value may be. A `:custom` function returns `{:ok, value}` or `{:error, expected}`, or
  `{:error, expected, hint}` with a sentence on what to write instead.
  """
  @type type ::
          :any
          | :boolean
          | :string
          | :path
          | :keyword
          | {:integer, Range.t()}
          | {:number, number(), number()}
          | {:in, [term()]}
          | {:function, arity()}
          | {:list, type()}
          | {:or, [type()]}
          | {:handle, module()}
          | {:custom, {module(), atom()}}
          | {:refused, String.t()}

  @type schema :: [{atom(), keyword()}]

  @doc """
  The options with all defaults, in the order of the table. Raises `ArgumentError`; `what` is the
  function that takes them.
  """
  @spec validate!(term(), schema(), String.t()) :: keyword()
  def validate!(options, schema, what) do
    given = given!(options, schema, what)

    for {key, entry} <- schema, not refused?(entry) do
      if entry[:required] && given[key] in [nil, ""] do
        raise ArgumentError, "expected #{inspect(key)} to be given, #{what} requires it"
      end

      {key, Keyword.get(given, key, entry[:default])}
    end
  end

  @doc "The options that are given, checked, without the defaults."
  @spec given!(term(), schema(), String.t()) :: keyword()
  def given!(options, schema, what) do
    options = pairs!(options, what)
    known!(Keyword.keys(options), schema, what)
    once!(options)
    for {key, value} <- options, do: {key, value!(key, value, schema[key])}
  end

  @doc "Raises where the options are no keyword list."
  @spec pairs!(term(), String.t()) :: keyword()
  def pairs!(options, what) do
    cond do
      Keyword.keyword?(options) ->
        options

      is_non_struct_map(options) ->
        raise ArgumentError,
              "expected the options of #{what} to be a keyword list (key: value), " <>
                "got a map: #{show(options)}"

      true ->
        raise ArgumentError,
              "expected the options of #{what} to be a keyword list, got: #{show(options)}"
    end
  end

  @doc "Raises for the keys that the table does not have."
  @spec known!([term()], schema(), String.t()) :: :ok
  def known!(keys, schema, what) do
    case Enum.uniq(Enum.reject(keys, &(is_atom(&1) and Keyword.has_key?(schema, &1)))) do
      [] -> :ok
      unknown -> raise ArgumentError, Unknown.message(unknown, names(schema), what)
    end
  end

  # Those that may be shown.
  defp names(schema) do
    for {name, entry} <- schema, not refused?(entry), entry[:doc] != false, do: name
  end

  defp once!(options) do
    for {key, [first | others]} <- Enum.group_by(options, &elem(&1, 0), &elem(&1, 1)),
        Enum.any?(others, &(&1 !== first)) do
      raise ArgumentError, "expected the option #{inspect(key)} once, it is given several times"
    end
  end

  @doc "The value of an option as its entry in the table has it; raises where it is none."
  @spec value!(atom(), term(), keyword()) :: term()
  def value!(key, value, entry) do
    case cast(entry, value) do
      {:ok, value} -> value
      :error -> wrong!(key, value, entry[:expected] || words(entry[:type] || :any))
      {:error, expected} -> wrong!(key, value, entry[:expected] || expected)
      {:error, expected, hint} -> wrong!(key, value, expected, " (#{hint})")
      {:refused, why} -> raise ArgumentError, "expected no option #{inspect(key)}: #{why}"
    end
  end

  @doc "Whether a value is what an option may be."
  @spec valid?(term(), keyword()) :: boolean()
  def valid?(value, entry), do: match?({:ok, _value}, cast(entry, value))

  defp wrong!(key, value, expected, hint \\ "") do
    raise ArgumentError,
          "expected #{inspect(key)} to be #{expected}, got: #{show(value)}#{hint}"
  end

  defp cast(entry, nil) do
    cond do
      refused?(entry) -> check(entry[:type], nil)
      entry[:required] || entry[:default] != nil -> check(entry[:type] || :any, nil)
      true -> {:ok, nil}
    end
  end

  defp cast(entry, value), do: check(entry[:type] || :any, value)

  defp check({:custom, {module, function}}, value), do: apply(module, function, [value])
  defp check({:refused, why}, _value), do: {:refused, why}

  defp check({:handle, module}, value) do
    with :ok <- Handle.check(value, module), do: {:ok, value}
  end

  defp check({:or, types}, value) do
    Enum.find_value(types, :error, fn type ->
      case check(type, value) do
        {:ok, value} -> {:ok, value}
        _wrong -> nil
      end
    end)
  end

  defp check({:list, type}, value) do
    if proper_list?(value) do
      checked = Enum.map(value, &check(type, &1))
      all? = Enum.all?(checked, &match?({:ok, _value}, &1))
      if all?, do: {:ok, Enum.map(checked, &elem(&1, 1))}, else: :error
    else
      :error
    end
  end

  defp check(type, value), do: if(is?(type, value), do: {:ok, value}, else: :error)

  defp is?(:any, _value), do: true
  defp is?(:boolean, value), do: is_boolean(value)
  defp is?(:string, value), do: is_binary(value) and String.valid?(value)
  defp is?(:path, value), do: path?(value)
  defp is?(:keyword, value), do: Keyword.keyword?(value)
  defp is?({:integer, range}, value), do: is_integer(value) and value in range

  defp is?({:number, least, most}, value),
    do: is_number(value) and value >= least and value <= most

  defp is?({:in, values}, value), do: Enum.any?(values, &(&1 === value))
  defp is?({:function, arity}, value), do: is_function(value, arity)

  defp words(:any), do: "anything"
  defp words(:boolean), do: "true or false"
  defp words(:string), do: "a string in UTF-8"
  defp words(:path), do: "a path"
  defp words(:keyword), do: "a keyword list"
  defp words({:integer, first..last//_}), do: "a whole number in #{first}..#{last}"
  defp words({:number, least, most}), do: "a number in #{least}..#{most}"
  defp words({:in, values}), do: either(Enum.map(values, &inspect/1))
  defp words({:function, 1}), do: "a function of one argument"
  defp words({:function, arity}), do: "a function of #{arity} arguments"
  defp words({:list, type}), do: "a list, each of it #{words(type)}"
  defp words({:or, types}), do: either(Enum.map(types, &words/1))
  defp words({:handle, module}), do: Handle.words(module)
  defp words({:custom, _function}), do: "something else"

  defp either([one]), do: one

  defp either(several),
    do: Enum.join(Enum.drop(several, -1), ", ") <> " or " <> List.last(several)

  @doc "Whether it is a list that ends as a list does: `[1 | 2]` is none."
  @spec proper_list?(term()) :: boolean()
  def proper_list?(value), do: is_list(value) and not List.improper?(value)

  @doc "Whether it can be a path: a string in UTF-8, not empty, without a zero byte."
  @spec path?(term()) :: boolean()
  def path?(value) do
    is_binary(value) and value != "" and String.valid?(value) and
      not String.contains?(value, <<0>>)
  end

  @doc """
  Raises where a value is no model, tokenizer or adapter, or is one of another node: what it stands
  for is in the memory of the node that loaded it.
  """
  @spec handle!(value, module()) :: value when value: term()
  def handle!(value, module) do
    case Handle.check(value, module) do
      :ok ->
        value

      {:error, expected} ->
        raise ArgumentError, "expected #{expected}, got: #{show(value)}"

      {:error, expected, hint} ->
        raise ArgumentError, "expected #{expected}, got: #{show(value)} (#{hint})"
    end
  end

  @doc "A term as a message may show it: not too long, and without tokens."
  @spec show(term()) :: String.t()
  def show(term) do
    inspect(Token.hide(term), limit: 20, printable_limit: 200)
  end

  @doc "The list of options for a doc string."
  @spec docs(schema()) :: String.t()
  def docs(schema) do
    for {name, entry} <- schema, doc = entry[:doc], into: "", do: line(name, doc, entry)
  end

  defp line(name, doc, entry) do
    required = if entry[:required], do: ", required", else: ""
    text = doc |> String.trim() |> with_default(default(entry)) |> String.replace("\n", "\n    ")
    "  * `#{inspect(name)}` (`#{Spec.text(entry)}`#{required}) - #{text}\n"
  end

  # It stands before a list of values.
  defp with_default(doc, default) do
    case String.split(doc, ":\n  * ", parts: 2) do
      [text, values] -> "#{text}#{default}\n  * #{values}"
      [text] -> text <> default
    end
  end

  defp default(entry) do
    cond do
      words = entry[:by_default] -> ". Default: #{String.trim(words)}"
      entry[:default] in [nil, [], %{}] -> ""
      true -> ". Default: `#{inspect(entry[:default])}`"
    end
  end

  defp refused?(entry), do: match?({:refused, _why}, entry[:type])
end
