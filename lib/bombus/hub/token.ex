defmodule Bombus.Hub.Token do
  @moduledoc false
  # A token that may stand in a term that is logged, as the options of a supervised serving are.

  @derive {Inspect, only: []}
  defstruct [:value]

  # Also what is no token, but where one should be.
  def wrap(%__MODULE__{} = token), do: token
  def wrap(none) when none in [nil, false], do: none
  def wrap(value), do: %__MODULE__{value: value}
end
