defmodule Bombus.Tensor do
  @moduledoc """
  A tensor as it lies in memory: `:type`, `:shape`, and `:binary`, its numbers in little endian, the
  last axis first.

  `:type` is Nx's: `{:u, 32}`, `{:s, 8}`, `{:f, 16}`, `{:bf, 16}`, `{:f, 8}` (E5M2), `{:f8_e4m3fn, 8}`,
  `{:c, 64}`. Those of safetensors that Nx lacks are `{:bool, 8}`, `{:f8_e8m0, 8}`, `{:f8_e4m3fnuz, 8}`,
  `{:f8_e5m2fnuz, 8}`, `{:f6_e2m3, 6}`, `{:f6_e3m2, 6}` and `{:f4, 4}`, whose numbers are packed.

      tensor = Bombus.Tensor.from_nx(Nx.tensor([[1.0, 2.0]]))
      #=> #Bombus.Tensor<f32[1][2]>
      Bombus.Tensor.to_nx(tensor)
  """

  alias Bombus.Options

  @typedoc "A tensor."
  @type t :: %__MODULE__{type: type(), shape: shape(), binary: binary()}

  @typedoc "A name and the bits of a number, such as `{:f, 32}`."
  @type type :: {atom(), pos_integer()}

  @typedoc "The sizes of the axes, such as `{2, 3}`."
  @type shape :: tuple()

  @enforce_keys [:type, :shape, :binary]
  defstruct @enforce_keys

  # Asked for when it is used: the package works without Nx.
  @compile {:no_warn_undefined, [Nx]}

  @foreign [:bool, :f8_e8m0, :f8_e4m3fnuz, :f8_e5m2fnuz, :f6_e2m3, :f6_e3m2, :f4]

  @doc """
  A tensor of a type, a shape and its numbers. Raises `ArgumentError` where the binary is not as
  large as the other two say.
  """
  @spec new(type(), shape(), binary()) :: t()
  def new({_name, bits} = type, shape, binary) do
    type!(type)
    shape!(shape)

    unless is_binary(binary) do
      raise ArgumentError, "expected the numbers as a binary, got: #{Options.show(binary)}"
    end

    expected = shape |> Tuple.product() |> Kernel.*(bits) |> div(8)

    if byte_size(binary) != expected do
      raise ArgumentError,
            "expected #{expected} bytes for a tensor #{title(type, shape)}, got: #{byte_size(binary)}"
    end

    %__MODULE__{type: type, shape: shape, binary: binary}
  end

  def new(type, _shape, _binary), do: type!(type)

  defp type!({name, bits}) when is_atom(name) and bits in 1..128, do: :ok

  defp type!(other) do
    raise ArgumentError, "expected a type such as {:f, 32}, got: #{Options.show(other)}"
  end

  defp shape!(shape) do
    unless is_tuple(shape) and Enum.all?(Tuple.to_list(shape), &(is_integer(&1) and &1 >= 0)) do
      raise ArgumentError, "expected a shape such as {2, 3}, got: #{Options.show(shape)}"
    end
  end

  @doc """
  As a tensor of Nx's default backend. A `{:bool, 8}` becomes `{:u, 8}`; types that Nx lacks raise
  `ArgumentError`.
  """
  @spec to_nx(t() | struct()) :: struct()
  def to_nx(%__MODULE__{type: {:bool, 8}} = tensor), do: to_nx(%{tensor | type: {:u, 8}})

  def to_nx(%__MODULE__{type: {name, _bits} = type, shape: shape}) when name in @foreign do
    raise ArgumentError, "expected a type that Nx has, got a tensor #{title(type, shape)}"
  end

  def to_nx(%__MODULE__{} = tensor) do
    nx!()
    tensor.binary |> Nx.from_binary(tensor.type) |> Nx.reshape(tensor.shape)
  end

  def to_nx(tensor) when is_struct(tensor, Nx.Tensor), do: tensor
  def to_nx(other), do: none!(other)

  @doc false
  # Raises where there is no Nx.
  def nx! do
    unless Code.ensure_loaded?(Nx) do
      raise "tensors of Nx need it: add {:nx, \"~> 0.10\"} to your dependencies"
    end
  end

  @doc "From a tensor of Nx, from whatever backend; axis names are lost. A `Bombus.Tensor` stays one."
  @spec from_nx(struct()) :: t()
  def from_nx(%__MODULE__{type: type, shape: shape, binary: binary}), do: new(type, shape, binary)

  def from_nx(tensor) when is_struct(tensor, Nx.Tensor) do
    new(Nx.type(tensor), Nx.shape(tensor), Nx.to_binary(tensor))
  end

  def from_nx(other), do: none!(other)

  @spec none!(term()) :: no_return()
  defp none!(other) do
    raise ArgumentError,
          "expected a Bombus.Tensor or an Nx.Tensor, got: #{Options.show(other)}"
  end

  @doc false
  def title({name, bits}, shape) do
    axes = shape |> Tuple.to_list() |> Enum.map_join(&"[#{&1}]")
    if name in [:u, :s, :f, :bf, :c], do: "#{name}#{bits}#{axes}", else: "#{name}#{axes}"
  end

  defimpl Inspect do
    def inspect(tensor, _options) do
      "#Bombus.Tensor<#{Bombus.Tensor.title(tensor.type, tensor.shape)}>"
    end
  end
end
