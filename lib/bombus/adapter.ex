defmodule Bombus.Adapter do
  @moduledoc """
  A LoRA or DoRA adapter, made by `Bombus.load_adapter/2`.

    * `:rank` - the rank of its pairs (of most, where they differ)
    * `:scale` - what their product is multiplied with (of most, where they differ)

  It is read without a model, and bound to one when it is first used with it: only then does it
  show whether it fits. Many sequences with different adapters run in one batch.
  """

  @type t :: %__MODULE__{rank: pos_integer(), scale: float(), ref: reference()}

  @derive {Inspect, except: [:ref]}
  @enforce_keys [:ref, :rank, :scale]
  defstruct @enforce_keys
end
