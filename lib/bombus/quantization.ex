defmodule Bombus.Quantization do
  alias Bombus.{Device, Error, Native, Options, Safetensors, Tensor}

  @modes [mxfp4: {32, 4}, mxfp8: {32, 8}, nvfp4: {16, 4}]

  @mode [
    type: {:in, [:affine | Keyword.keys(@modes)]},
    default: :affine,
    doc: """
    MLX's mode. The others have floats for codes: `:mxfp4` (groups of 32, 4 bits), `:mxfp8` (groups of 32,
    8 bits) and `:nvfp4` (groups of 16, 4 bits). Their scales are `{:u, 8}`, their biases `nil`, and what
    comes back is `{:bf, 16}`. They run on MLX's devices
    """
  ]
  @device Keyword.update!(Device.schema(), :device, fn entry ->
            Keyword.merge(entry, by_default: "`:cpu`", doc: "as in `Bombus.load_model/2`")
          end)
  @options [mode: @mode] ++ @device

  @moduledoc """
  Matrices in MLX's affine quantization: quantizes and dequantizes them, and multiplies by them as they are.

      {weight, scales, biases} = Bombus.Quantization.quantize(w, 64, 4)
      y = Bombus.Quantization.quantized_matmul(x, weight, scales, biases, true, 64, 4)

  A row's groups of `group_size` numbers (32, 64 or 128) each have a scale and a bias, so that
  `w = scale * code + bias` with codes of `bits` (2 to 6, or 8), packed into 32-bit words from the low bits
  on. For a matrix `{rows, columns}`:

    * `weight` - `{:u, 32}`, `{rows, columns * bits / 32}`
    * `scales`, `biases` - `{rows, columns / group_size}`, of the type of what was quantized: `{:f, 32}`,
      `{:f, 16}` or `{:bf, 16}`

  Tensors are Nx's or `Bombus.Tensor`s; the results are of the kind of the first argument.

  With `device: :gpu` and `{:mlx, :cpu}` these are MLX's own operations. On `:cpu` quantizing gives MLX's
  numbers bit by bit, and products are added up in float32 (within 0.00001 of MLX's in float32), and
  rounded once.

  ## Options

  The last argument of each function:

  #{Options.docs(@options)}
  ## Inside `defn`

  The functions may be called in `defn`, at least under Nx's evaluator: they become an
  `Nx.runtime_call/4`, so that group size, bits and options must be known there.

      defmodule MyLayer do
        import Nx.Defn

        defn dense(x, weight, scales, biases, bias) do
          Bombus.Quantization.quantized_matmul(x, weight, scales, biases, true, 64, 4) + bias
        end
      end

  What does not fit together raises `ArgumentError`, what goes wrong at run time `Bombus.Error`.
  """

  # Asked for when they are used: the package works without Nx.
  @compile {:no_warn_undefined, [Nx]}

  @typedoc "A `Bombus.Tensor`, or a tensor of Nx."
  @type tensor :: Tensor.t() | struct()

  @typedoc "How many numbers of a row share a scale; 16 is `:nvfp4`'s."
  @type group_size :: 16 | 32 | 64 | 128
  @typedoc "The bits of a code."
  @type bits :: 2..6 | 8

  @typedoc "An option of the functions here."
  @type option :: unquote(Options.Spec.option(@options))

  @doc "Quantizes a matrix, or a stack of matrices: `{weight, scales, biases}`."
  @spec quantize(tensor(), group_size(), bits(), [option()]) ::
          {tensor(), tensor(), tensor() | nil}
  def quantize(tensor, group_size \\ 64, bits \\ 4, options \\ []) do
    options = options!(options, group_size, bits)
    affine? = options.mode == :affine
    shape = shape(tensor)
    columns = last(shape)

    unless tuple_size(shape) >= 2 and rem(columns, group_size) == 0 and Tuple.product(shape) > 0 do
      raise ArgumentError,
            "expected a matrix whose rows are groups of #{group_size}, got the shape #{inspect(shape)}"
    end

    float!(tensor)

    result =
      call(:quantize, {tensor}, options, fn type ->
        weight = {{:u, 32}, with_last(shape, div(columns * bits, 32))}
        groups = with_last(shape, div(columns, group_size))

        if affine?,
          do: {weight, {type, groups}, {type, groups}},
          else: {weight, {{:u, 8}, groups}}
      end)

    with {weight, scales} <- result, do: {weight, scales, nil}
  end

  @doc "The numbers that `quantize/4` has quantized, rounded to its codes, in the type of the scales."
  @spec dequantize(tensor(), tensor(), tensor() | nil, group_size(), bits(), [option()]) ::
          tensor()
  def dequantize(weight, scales, biases, group_size \\ 64, bits \\ 4, options \\ []) do
    options = options!(options, group_size, bits)
    {_rows, columns} = quantized!(weight, scales, biases, options)

    call(:dequantize, present({weight, scales, biases}), options, fn _type ->
      type = if options.mode == :affine, do: type(scales), else: {:bf, 16}
      {type, with_last(shape(scales), columns)}
    end)
  end

  @doc """
  `x` times a quantized matrix, which is `{out, in}` where `transpose` (the default, as the weights of a
  linear layer lie), else `{in, out}`. `x` is `{..., in}`, of the type of the scales.
  """
  @spec quantized_matmul(
          tensor(),
          tensor(),
          tensor(),
          tensor() | nil,
          boolean(),
          group_size(),
          bits(),
          [option()]
        ) :: tensor()
  def quantized_matmul(
        x,
        weight,
        scales,
        biases,
        transpose \\ true,
        group_size \\ 64,
        bits \\ 4,
        options \\ []
      ) do
    unless is_boolean(transpose) do
      raise ArgumentError,
            "expected transpose to be true or false, got: #{Options.show(transpose)}"
    end

    options = options!(options, group_size, bits) |> Map.put(:transpose, transpose)
    {rows, columns} = quantized!(weight, scales, biases, options)
    {inputs, outputs} = if transpose, do: {columns, rows}, else: {rows, columns}

    unless tuple_size(shape(weight)) == 2 and tuple_size(shape(x)) > 0 and
             last(shape(x)) == inputs do
      raise ArgumentError,
            "expected rows of #{inputs} for a matrix {#{rows}, #{columns}}, got x of the shape " <>
              inspect(shape(x))
    end

    unless type(x) == type(scales) or options.mode != :affine do
      raise ArgumentError,
            "expected x to be of the type of the scales, #{inspect(type(scales))}, got: #{inspect(type(x))}"
    end

    float!(x)

    call(:matmul, present({x, weight, scales, biases}), options, fn type ->
      {type, with_last(shape(x), outputs)}
    end)
  end

  # What `defn` calls: as `Nx.Defn.deftransform/2` makes it, which would need Nx to compile.
  for {name, arities} <- [quantize: 1..4, dequantize: 3..6, quantized_matmul: 4..8],
      arity <- arities do
    arguments = Macro.generate_arguments(arity, __MODULE__)
    @doc false
    def unquote(:"__defn:#{name}__")(unquote_splicing(arguments)),
      do: unquote(name)(unquote_splicing(arguments))
  end

  # Within defn a promise of the result, else the result.
  defp call(operation, arguments, options, output) do
    first = elem(arguments, 0)

    if is_struct(first, Nx.Tensor) do
      output = first |> type() |> output.() |> template()

      Nx.runtime_call(
        output,
        arguments,
        [operation: operation, options: options],
        &__MODULE__.run/2
      )
    else
      run(arguments, operation: operation, options: options)
    end
  end

  @doc false
  def run(arguments, call) do
    arrays = arguments |> Tuple.to_list() |> Enum.map(&array/1)

    results =
      (&Native.quantization(call[:operation], arrays, call[:options], &1))
      |> Native.await()
      |> Error.unwrap!()
      |> Enum.map(fn {dtype, shape, binary} ->
        tensor = Tensor.new(Safetensors.type(dtype), List.to_tuple(shape), binary)
        if is_struct(elem(arguments, 0), Nx.Tensor), do: Tensor.to_nx(tensor), else: tensor
      end)

    case results do
      [one] -> one
      several -> List.to_tuple(several)
    end
  end

  defp array(tensor) do
    %Tensor{type: type, shape: shape, binary: binary} = Tensor.from_nx(tensor)
    {Safetensors.dtype(type), Tuple.to_list(shape), binary}
  end

  defp template({{name, _bits} = type, shape}) when is_atom(name), do: Nx.template(shape, type)
  defp template({one, two}), do: {template(one), template(two)}
  defp template({one, two, three}), do: {template(one), template(two), template(three)}

  # Without the biases that a mode has not.
  defp present(arguments) do
    arguments |> Tuple.to_list() |> Enum.reject(&is_nil/1) |> List.to_tuple()
  end

  defp options!(options, group_size, bits) do
    options = Options.validate!(options, @options, "Bombus.Quantization")
    layout!(options[:mode], group_size, bits)
    # No model is here, whose device it could be.
    device = Device.native(options, :cpu)
    %{device: device, mode: options[:mode], group_size: group_size, bits: bits, transpose: true}
  end

  defp layout!(:affine, group_size, bits) do
    unless group_size in [32, 64, 128] and bits in [2, 3, 4, 5, 6, 8] do
      raise ArgumentError,
            "expected groups of 32, 64 or 128 and 2 to 6 or 8 bits, got: #{inspect({group_size, bits})}"
    end
  end

  defp layout!(mode, group_size, bits) do
    case @modes[mode] do
      {^group_size, ^bits} ->
        :ok

      expected ->
        raise ArgumentError,
              "expected group size and bits of #{mode} to be #{inspect(expected)}, " <>
                "got: #{inspect({group_size, bits})}"
    end
  end

  # -> rows and columns of what was quantized
  defp quantized!(weight, scales, biases, %{group_size: group_size, bits: bits, mode: mode}) do
    columns = last(shape(scales)) * group_size

    whole? =
      if mode == :affine do
        biases != nil and {type(scales), shape(scales)} == {type(biases), shape(biases)}
      else
        biases == nil and type(scales) == {:u, 8}
      end

    fits? =
      whole? and type(weight) == {:u, 32} and tuple_size(shape(scales)) >= 2 and
        shape(weight) == with_last(shape(scales), div(columns * bits, 32))

    unless fits? do
      raise ArgumentError,
            "expected a weight with its scales and biases, got: #{title(weight)}, #{title(scales)} and " <>
              "#{title(biases)}, which do not fit together in #{bits} bits and groups of " <>
              "#{group_size} (#{mode})"
    end

    if mode == :affine, do: float!(scales)
    {scales |> shape() |> Tuple.product() |> div(last(shape(scales))), columns}
  end

  defp float!(tensor) do
    unless type(tensor) in [{:f, 32}, {:f, 16}, {:bf, 16}] do
      raise ArgumentError,
            "expected {:f, 32}, {:f, 16} or {:bf, 16}, got: #{inspect(type(tensor))}"
    end
  end

  defp title(nil), do: "nil"
  defp title(tensor), do: Tensor.title(type(tensor), shape(tensor))

  defp type(%Tensor{type: type}), do: type
  defp type(tensor) when is_struct(tensor, Nx.Tensor), do: tensor.type
  defp type(other), do: Tensor.from_nx(other)

  defp shape(%Tensor{shape: shape}), do: shape
  defp shape(tensor) when is_struct(tensor, Nx.Tensor), do: tensor.shape
  defp shape(other), do: Tensor.from_nx(other)

  defp last({}), do: 0
  defp last(shape), do: elem(shape, tuple_size(shape) - 1)
  defp with_last(shape, axis), do: put_elem(shape, tuple_size(shape) - 1, axis)
end
