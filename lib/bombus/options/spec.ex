defmodule Bombus.Options.Spec do
  @moduledoc false
  # The typespecs of a table of options:
  #
  #     @type option :: unquote(Bombus.Options.Spec.option(@schema))
  #
  # A `:custom` type does not show what it takes: such an entry says so in `:type_spec`, quoted.

  # Above this, a bound is one of the machine's.
  @large 0x7FFFFFFF

  @doc "The type of a list's elements, quoted: `{name, value}` for every option that may be given."
  @spec option([{atom(), keyword()}]) :: Macro.t()
  def option(schema) do
    schema
    |> Enum.reject(fn {_name, entry} -> match?({:refused, _why}, entry[:type]) end)
    |> Enum.map(fn {name, entry} -> {name, or_nil(value(entry), entry)} end)
    |> either()
  end

  @doc "The type of a map that has `required` names, `{name, type}`, and options beside them, quoted."
  @spec map([{atom(), Macro.t()}], [{atom(), keyword()}]) :: Macro.t()
  def map(required, schema) do
    required = for {name, type} <- required, do: {quote(do: required(unquote(name))), type}

    optional =
      for {name, entry} <- schema,
          do: {quote(do: optional(unquote(name))), or_nil(value(entry), entry)}

    {:%{}, [], required ++ optional}
  end

  @doc "The type of an option's value as the docs show it."
  @spec text(keyword()) :: String.t()
  def text(entry), do: entry |> value() |> Macro.to_string() |> String.replace(~r/\s+/, " ")

  # An option without a default takes nil for what is not given.
  defp or_nil(type, entry),
    do: if(entry[:default] == nil and !entry[:required], do: either([type, nil]), else: type)

  defp value(entry), do: entry[:type_spec] || type(entry[:type] || :any)

  defp type(:any), do: quote(do: term())
  defp type(:boolean), do: quote(do: boolean())
  defp type(:string), do: quote(do: String.t())
  defp type(:path), do: quote(do: Path.t())
  defp type(:keyword), do: quote(do: keyword())
  defp type({:integer, 1..last//_}) when last >= @large, do: quote(do: pos_integer())
  defp type({:integer, 0..last//_}) when last >= @large, do: quote(do: non_neg_integer())
  defp type({:integer, _.._//_ = range}) when range.last >= @large, do: quote(do: integer())
  defp type({:integer, first..last//_}), do: quote(do: unquote(first)..unquote(last))
  defp type({:number, _least, _most}), do: quote(do: number())
  defp type({:in, values}), do: either(values)
  defp type({:function, 1}), do: quote(do: (term() -> term()))
  defp type({:list, type}), do: [type(type)]
  defp type({:or, types}), do: types |> Enum.map(&type/1) |> either()
  defp type({:handle, module}), do: quote(do: unquote(module).t())

  defp either(types) do
    types
    |> Enum.flat_map(&alternatives/1)
    |> Enum.reverse()
    |> Enum.reduce(fn type, rest -> quote(do: unquote(type) | unquote(rest)) end)
  end

  defp alternatives({:|, _, types}), do: Enum.flat_map(types, &alternatives/1)
  defp alternatives(type), do: [type]
end
