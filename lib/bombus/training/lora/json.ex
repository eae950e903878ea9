defmodule Bombus.Training.LoRA.Json do
  @moduledoc false
  # A row as JSON text, from which templates make tokens in its order: that of the caller where there
  # is one (a keyword list, a list of pairs), else that of the names. Maps of atoms have the VM's.

  @doc "The JSON text; throws `{:skip, reason}` for what is none."
  @spec encode(term()) :: iodata()
  def encode(value) when is_nil(value) or is_boolean(value) or is_number(value),
    do: JSON.encode!(value)

  def encode(atom) when is_atom(atom), do: atom |> Atom.to_string() |> encode()

  def encode(text) when is_binary(text) do
    if String.valid?(text), do: JSON.encode!(text), else: none()
  end

  def encode(struct) when is_struct(struct) do
    JSON.encode_to_iodata!(struct)
  rescue
    _error -> none()
  end

  def encode(map) when is_map(map) do
    map |> Enum.map(fn {name, value} -> {name(name), value} end) |> Enum.sort() |> object()
  end

  def encode(list) when is_list(list) do
    cond do
      List.improper?(list) -> none()
      list != [] and Enum.all?(list, &named?/1) -> list |> Enum.map(&named/1) |> object()
      true -> [?[, list |> Enum.map(&encode/1) |> Enum.intersperse(?,), ?]]
    end
  end

  def encode(_other), do: none()

  defp object(pairs) do
    fields = for {name, value} <- pairs, do: [encode(name), ?:, encode(value)]
    [?{, Enum.intersperse(fields, ?,), ?}]
  end

  defp named?(pair), do: match?({name, _value} when is_atom(name) or is_binary(name), pair)
  defp named({name, value}), do: {name(name), value}

  defp name(name) when is_atom(name) or is_number(name), do: to_string(name)
  defp name(name) when is_binary(name), do: name
  defp name(_other), do: none()

  defp none, do: throw({:skip, "it has something that is no JSON"})
end
