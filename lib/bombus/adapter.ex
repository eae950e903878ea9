defmodule Bombus.Adapter do
  @moduledoc """
  A LoRA or DoRA adapter, made by `Bombus.load_adapter/2`.

    * `:name` - what its source is called: an id, a folder, or the name of a demo adapter
    * `:format` - `:mlx_lm` or `:peft`
    * `:rank` - the rank of its matrices; where modules differ, that of most of them
    * `:scale` - what their product is multiplied by; where modules differ, that of most of them

  It is read without a model, and bound to one when it is first used with it. Only then can an error
  say that it does not fit. Many sequences with different adapters run in one batch.
  """

  @typedoc "A loaded adapter."
  @type t :: %__MODULE__{
          name: String.t() | nil,
          format: :mlx_lm | :peft | nil,
          rank: pos_integer(),
          scale: float(),
          ref: reference()
        }

  @behaviour Bombus.Handle

  @derive {Inspect, except: [:ref]}
  @enforce_keys [:ref, :rank, :scale]
  defstruct [:name, :format, :rank, :scale, :ref]

  @doc false
  @impl Bombus.Handle
  def handle, do: {:adapter, "an adapter", "Bombus.load_adapter/2"}

  @doc false
  def from_native({ref, format, rank, scale, _warnings}, name) do
    %__MODULE__{name: name, format: format, ref: ref, rank: rank, scale: scale}
  end

  # The engine computes in float32: below its smallest number is 0.
  @smallest 1.2e-38
  @largest 3.4e38

  @doc false
  # The type of the option `:scale`.
  def scale(number) when is_number(number) and number == 0,
    do: {:error, "a number other than 0", "such an adapter does nothing: use adapter: nil"}

  def scale(number)
      when is_number(number) and abs(number) >= @smallest and abs(number) <= @largest,
      do: {:ok, number * 1.0}

  def scale(_other), do: {:error, "a number within float32"}
end
