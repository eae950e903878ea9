defmodule Bombus.Hub.Token do
  @moduledoc false
  # A token that may stand in a term that is logged, as the options of a supervised serving are.

  @derive {Inspect, only: []}
  defstruct [:value]

  # Also what is no token, but where one should be.
  def wrap(%__MODULE__{} = token), do: token
  def wrap(none) when none in [nil, false], do: none
  def wrap(value), do: %__MODULE__{value: value}

  @doc "A term as it may be logged: what looks like a token by its key is wrapped."
  def hide({key, value}) when is_atom(key) or is_binary(key) do
    if secret?(to_string(key)), do: {key, wrap(value)}, else: {key, hide(value)}
  end

  def hide(tuple) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> hide() |> List.to_tuple()
  def hide([head | tail]), do: [hide(head) | hide(tail)]
  def hide(map) when is_non_struct_map(map), do: Map.new(map, &hide/1)
  def hide(other), do: other

  defp secret?(key), do: key =~ ~r/auth|password|secret|api_key/ or key in ~w(token hf_token)
end
