defmodule Bombus.QuantizationTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Quantization, Safetensors, Tensor}

  @compile {:no_warn_undefined, [Nx]}
  @layouts for bits <- [2, 3, 4, 5, 6, 8], group_size <- [32, 64, 128], do: {group_size, bits}

  defp tensor(shape, seed) do
    :rand.seed(:exsss, seed)

    numbers =
      for _ <- 1..Tuple.product(shape), into: <<>>, do: <<:rand.normal() * 0.1::float-little-32>>

    Tensor.new({:f, 32}, shape, numbers)
  end

  defp numbers(%Tensor{type: {:f, 32}, binary: binary}),
    do: for(<<x::float-little-32 <- binary>>, do: x)

  defp distance(one, other) do
    assert {one.type, one.shape} == {other.type, other.shape}
    Enum.zip_with(numbers(one), numbers(other), &abs(&1 - &2)) |> Enum.max()
  end

  test "what is quantized comes back, and multiplies as what comes back" do
    for {group_size, bits} <- @layouts do
      w = tensor({6, 256}, 1)
      {weight, scales, biases} = Quantization.quantize(w, group_size, bits)
      assert {weight.type, weight.shape} == {{:u, 32}, {6, div(256 * bits, 32)}}
      assert {scales.type, scales.shape} == {{:f, 32}, {6, div(256, group_size)}}
      assert biases.shape == scales.shape
      back = Quantization.dequantize(weight, scales, biases, group_size, bits)
      assert distance(w, back) <= Enum.max(Enum.map(numbers(scales), &abs/1)) * 1.001

      # The rows of the unit matrix give the columns of what comes back.
      one =
        for row <- 0..255,
            column <- 0..255,
            into: <<>>,
            do: <<if(row == column, do: 1.0, else: 0.0)::float-little-32>>

      one = Tensor.new({:f, 32}, {256, 256}, one)
      y = Quantization.quantized_matmul(one, weight, scales, biases, true, group_size, bits)
      assert y.shape == {256, 6}
      turned = for row <- 0..255, column <- 0..5, do: Enum.at(numbers(back), column * 256 + row)
      assert Enum.zip_with(numbers(y), turned, &abs(&1 - &2)) |> Enum.max() < 1.0e-5
    end
  end

  test "the devices agree: codes bit by bit, products within rounding" do
    for {:mlx, :cpu} = device <- Fixtures.devices(), {group_size, bits} <- @layouts do
      w = tensor({8, 256}, 2)
      quantized = {weight, scales, biases} = Quantization.quantize(w, group_size, bits)
      assert Quantization.quantize(w, group_size, bits, device: device) == quantized
      own = Quantization.dequantize(weight, scales, biases, group_size, bits)
      theirs = Quantization.dequantize(weight, scales, biases, group_size, bits, device: device)
      assert distance(own, theirs) < 1.0e-5

      for {transpose, inputs} <- [{true, 256}, {false, 8}] do
        x = tensor({2, 3, inputs}, 3)

        own =
          Quantization.quantized_matmul(x, weight, scales, biases, transpose, group_size, bits)

        theirs =
          Quantization.quantized_matmul(x, weight, scales, biases, transpose, group_size, bits,
            device: device
          )

        assert distance(own, theirs) < 1.0e-5
      end
    end
  end

  test "MLX's modes of floats" do
    for {:mlx, :cpu} = device <- Fixtures.devices(),
        {mode, group_size, bits} <- [{:mxfp4, 32, 4}, {:mxfp8, 32, 8}, {:nvfp4, 16, 4}] do
      options = [device: device, mode: mode]

      {weight, scales, nil} =
        Quantization.quantize(tensor({4, 128}, 5), group_size, bits, options)

      assert weight.shape == {4, 4 * bits}
      assert {scales.type, scales.shape} == {{:u, 8}, {4, div(128, group_size)}}
      back = Quantization.dequantize(weight, scales, nil, group_size, bits, options)
      assert {back.type, back.shape} == {{:bf, 16}, {4, 128}}
      x = tensor({3, 128}, 6)
      y = Quantization.quantized_matmul(x, weight, scales, nil, true, group_size, bits, options)
      assert {y.type, y.shape} == {{:f, 32}, {3, 4}}

      assert_raise ArgumentError, ~r/of #{mode} to be/, fn ->
        Quantization.quantize(tensor({4, 128}, 5), 64, bits, options)
      end

      assert_raise Error, ~r/MLX's/, fn ->
        Quantization.quantize(tensor({4, 128}, 5), group_size, bits, mode: mode)
      end
    end

    assert_raise ArgumentError, ~r/:mode/, fn ->
      Quantization.quantize(tensor({4, 128}, 5), 64, 4, mode: :int4)
    end
  end

  test "a checkpoint's own layer is taken back" do
    {:ok, tensors} = Safetensors.read(Fixtures.checkpoint("f32-tied"))
    path = "model.layers.0.mlp.up_proj"

    [weight, scales, biases] =
      for part <- ~w(weight scales biases), do: tensors["#{path}.#{part}"]

    dense = Quantization.dequantize(weight, scales, biases)
    assert Quantization.quantize(dense) |> elem(0) |> Map.fetch!(:shape) == weight.shape
    assert distance(Quantization.dequantize(weight, scales, biases, 64, 4), dense) == 0.0
  end

  test "what does not fit is told" do
    {weight, scales, biases} = Quantization.quantize(tensor({4, 128}, 1), 64, 4)
    raises = fn words, fun -> assert_raise(ArgumentError, words, fun) end
    raises.(~r/groups of 64/, fn -> Quantization.quantize(tensor({4, 96}, 1), 64, 4) end)
    raises.(~r/a matrix/, fn -> Quantization.quantize(tensor({128}, 1), 64, 4) end)
    raises.(~r/2 to 6 or 8 bits/, fn -> Quantization.quantize(tensor({4, 128}, 1), 64, 7) end)
    whole = %Tensor{type: {:s, 32}, shape: {1, 64}, binary: <<0::2048>>}
    raises.(~r/expected {:f, 32}/, fn -> Quantization.quantize(whole, 64, 4) end)

    raises.(~r/do not fit together/, fn ->
      Quantization.dequantize(weight, scales, biases, 64, 8)
    end)

    raises.(~r/do not fit together/, fn -> Quantization.dequantize(scales, scales, biases) end)

    raises.(~r/rows of 128/, fn ->
      Quantization.quantized_matmul(tensor({2, 64}, 1), weight, scales, biases)
    end)

    half = %Tensor{type: {:bf, 16}, shape: {1, 128}, binary: <<0::2048>>}

    raises.(~r/type of the scales/, fn ->
      Quantization.quantized_matmul(half, weight, scales, biases)
    end)

    raises.(~r/unknown option :devise/, fn ->
      Quantization.quantize(tensor({4, 128}, 1), 64, 4, devise: :gpu)
    end)

    raises.(~r/Bombus.Tensor or an Nx.Tensor/, fn -> Quantization.quantize([1.0], 64, 4) end)
  end

  if Code.ensure_loaded?(Nx) do
    defmodule Layer do
      import Nx.Defn

      defn dense(x, weight, scales, biases, bias) do
        Nx.max(
          Bombus.Quantization.quantized_matmul(x, weight, scales, biases, true, 64, 4) + bias,
          0
        )
      end

      defn floats(x, w) do
        {weight, scales, _none} =
          Bombus.Quantization.quantize(w, 32, 4, mode: :mxfp4, device: {:mlx, :cpu})

        Bombus.Quantization.quantized_matmul(x, weight, scales, nil, true, 32, 4,
          mode: :mxfp4,
          device: {:mlx, :cpu}
        )
      end

      defn there_and_back(w) do
        {weight, scales, biases} = Bombus.Quantization.quantize(w, 32, 8)
        Bombus.Quantization.dequantize(weight, scales, biases, 32, 8)
      end
    end

    test "Nx tensors in, Nx tensors out, also inside defn" do
      w = tensor({5, 128}, 1)
      x = tensor({2, 128}, 2)
      {weight, scales, biases} = Quantization.quantize(Tensor.to_nx(w), 64, 4)
      assert Nx.type(weight) == {:u, 32} and Nx.shape(weight) == {5, 16}
      {own_weight, own_scales, own_biases} = Quantization.quantize(w, 64, 4)
      assert Tensor.from_nx(weight) == own_weight
      y = Quantization.quantized_matmul(Tensor.to_nx(x), weight, scales, biases, true, 64, 4)

      assert Tensor.from_nx(y) ==
               Quantization.quantized_matmul(x, own_weight, own_scales, own_biases)

      bias = Nx.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

      assert Layer.dense(Tensor.to_nx(x), weight, scales, biases, bias) ==
               Nx.max(Nx.add(y, bias), 0)

      back = Layer.there_and_back(Tensor.to_nx(w))
      assert Nx.shape(back) == {5, 128}
      assert Nx.to_number(Nx.reduce_max(Nx.abs(Nx.subtract(back, Tensor.to_nx(w))))) < 0.01

      if Fixtures.mlx?(),
        do: assert(Nx.shape(Layer.floats(Tensor.to_nx(x), Tensor.to_nx(w))) == {2, 5})

      bf16 = w |> Tensor.to_nx() |> Nx.as_type(:bf16)
      assert {_, scales, _} = Quantization.quantize(bf16)
      assert Nx.type(scales) == {:bf, 16}
    end
  end
end
