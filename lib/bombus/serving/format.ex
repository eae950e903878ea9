defmodule Bombus.Serving.Format do
  @moduledoc false
  # The option `:format`: what a text must be. A schema becomes JSON text here, with an order of its
  # names that is the same in every VM.

  alias Bombus.OrderedJSON

  @expected ":json, {:json_schema, schema}, {:regex, text} or {:grammar, text}"

  @doc false
  def check(nil), do: {:ok, nil}
  def check(:json), do: {:ok, :json}

  def check({:json_schema, schema}) when is_binary(schema) do
    case JSON.decode(schema) do
      {:ok, _value} -> {:ok, {:json_schema, schema}}
      {:error, _reason} -> {:error, @expected, "the schema is no JSON text"}
    end
  end

  def check({:json_schema, schema}) when is_map(schema) or is_list(schema) do
    {:ok, {:json_schema, IO.iodata_to_binary(OrderedJSON.encode(schema, :schema))}}
  catch
    {:not_text, binary} -> {:error, @expected, "#{inspect(binary)} in it is not UTF-8"}
    {:name_twice, object} -> {:error, @expected, "a name stands twice in #{inspect(object)}"}
    {:not_json, term} -> {:error, @expected, "JSON has no #{inspect(term)}"}
  end

  def check({kind, text}) when kind in [:regex, :grammar] and is_binary(text) do
    if String.valid?(text), do: {:ok, {kind, text}}, else: {:error, @expected, "it is not UTF-8"}
  end

  def check({:regex, %Regex{}}),
    do: {:error, @expected, "write the expression as a string: {:regex, \"a+\"}"}

  def check(:json_schema), do: {:error, @expected, "the schema is missing"}
  def check(_other), do: {:error, @expected}
end
