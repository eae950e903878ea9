defmodule Bombus.Adapter do
  @moduledoc """
  A LoRA or DoRA adapter, made by `Bombus.load_adapter/2`.

    * `:name` - what its source is called: an id, a folder, or the name of a demo adapter
    * `:format` - `:mlx_lm` or `:peft`
    * `:rank` - the rank of its pairs (of most, where they differ)
    * `:scale` - what their product is multiplied with (of most, where they differ)

  It is read without a model, and bound to one when it is first used with it: only then does it
  show whether it fits. Many sequences with different adapters run in one batch.
  """

  @type t :: %__MODULE__{
          name: String.t() | nil,
          format: :mlx_lm | :peft | nil,
          rank: pos_integer(),
          scale: float(),
          ref: reference()
        }

  @derive {Inspect, except: [:ref]}
  @enforce_keys [:ref, :rank, :scale]
  defstruct [:name, :format, :rank, :scale, :ref]

  @doc false
  def from_native({ref, rank, scale}, name) do
    %__MODULE__{name: name, ref: ref, rank: rank, scale: scale}
  end
end
