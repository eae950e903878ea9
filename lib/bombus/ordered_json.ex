defmodule Bombus.OrderedJSON do
  @moduledoc false
  # JSON text whose order of names is the same in every VM. Where the caller has an order (a keyword
  # list, a list of pairs, JSON text), it stays. A map has none, and that of its atoms differs from
  # VM to VM, and with it the tokens: its names are sorted, those of messages, tools and schemas as
  # OpenAI's documents have them.

  @orders %{
    message: ~w(role content name reasoning_content tool_calls tool_call_id),
    part: ~w(type text),
    call: ~w(id type function),
    called: ~w(name arguments),
    tool: ~w(type function name description parameters),
    function: ~w(name description parameters),
    schema: ~w(type enum const format description items properties required additionalProperties),
    document: ~w(title text)
  }

  # What lies below a name; a list's elements are of the list's kind.
  @inner %{
    message: %{"content" => :part, "tool_calls" => :call},
    call: %{"function" => :called},
    tool: %{"function" => :function, "parameters" => :schema, "return" => :schema},
    function: %{"parameters" => :schema, "return" => :schema},
    schema:
      Map.merge(
        Map.new(~w(items additionalProperties anyOf oneOf allOf not prefixItems), &{&1, :schema}),
        Map.new(~w(properties patternProperties $defs definitions), &{&1, :schemas})
      ),
    options: %{"tools" => :tool, "documents" => :document},
    row: %{"messages" => :message, "tools" => :tool}
  }

  @doc """
  The JSON text of a value; `{:json, text}` in it is JSON text already.

  `kind` says what it is: `:message`, `:options` (of a chat template), `:row` (of training data).
  Throws `{:not_text, binary}` for what is not UTF-8, `{:name_twice, object}`, and
  `{:not_json, term}` for what JSON does not have.
  """
  @spec encode(term(), atom()) :: iodata()
  def encode(nil, _kind), do: "null"
  def encode(bool, _kind) when is_boolean(bool), do: Atom.to_string(bool)

  # It may be a caller's tuple.
  def encode({:json, text} = json, _kind) when is_binary(text) do
    if match?({:ok, _value}, JSON.decode(text)), do: text, else: throw({:not_json, json})
  end

  def encode(number, _kind) when is_number(number), do: JSON.encode!(number)
  def encode(atom, _kind) when is_atom(atom), do: text(Atom.to_string(atom))
  def encode(text, _kind) when is_binary(text), do: text(text)
  def encode(%_struct{} = struct, _kind), do: encoded(struct)

  def encode(value, kind) do
    cond do
      object?(value) -> object(value, kind)
      Bombus.Options.proper_list?(value) -> array(value, kind)
      true -> throw({:not_json, value})
    end
  end

  defp object(value, kind) do
    fields =
      for {name, value} <- pairs(value, kind),
          do: [text(name), ?:, encode(value, inner(kind, name))]

    [?{, Enum.intersperse(fields, ?,), ?}]
  end

  defp array(value, kind),
    do: [?[, value |> Enum.map(&encode(&1, kind)) |> Enum.intersperse(?,), ?]]

  # The names of properties are the caller's, what lies below each is a schema.
  defp inner(:schemas, _name), do: :schema
  defp inner(kind, name), do: get_in(@inner, [kind, name]) || :any

  defp encoded(struct) do
    JSON.encode!(struct)
  rescue
    _error -> throw({:not_json, struct})
  end

  defp text(text) do
    if String.valid?(text), do: JSON.encode!(text), else: throw({:not_text, text})
  end

  @doc "Whether it is a map, or a list of pairs with names that is not empty."
  @spec object?(term()) :: boolean()
  def object?(map) when is_non_struct_map(map), do: true

  def object?([_ | _] = list) do
    Bombus.Options.proper_list?(list) and
      Enum.all?(list, &match?({name, _value} when is_atom(name) or is_binary(name), &1))
  end

  def object?(_other), do: false

  @doc "The pairs of an object in their order, with strings as names."
  @spec pairs(map() | [{atom() | String.t(), term()}], atom()) :: [{String.t(), term()}]
  def pairs(object, kind) do
    pairs = for {name, value} <- object, do: {name!(name), value}

    if length(Enum.uniq_by(pairs, &elem(&1, 0))) < length(pairs),
      do: throw({:name_twice, object})

    if is_map(object), do: Enum.sort_by(pairs, &place(&1, @orders[kind] || [])), else: pairs
  end

  defp place({name, _value}, order) do
    {Enum.find_index(order, &(&1 == name)) || length(order), name}
  end

  defp name!(name) when is_atom(name), do: Atom.to_string(name)
  defp name!(name) when is_number(name) or is_binary(name), do: to_string(name)
  defp name!(other), do: throw({:not_json, other})
end
