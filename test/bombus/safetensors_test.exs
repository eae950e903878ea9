defmodule Bombus.SafetensorsTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Safetensors, Tensor}

  @moduletag :tmp_dir
  @compile {:no_warn_undefined, [Nx]}

  # Every type of the format, with as many bytes as three numbers of it need, or four where it packs.
  @types [
    {{:bool, 8}, {3}},
    {{:u, 8}, {3}},
    {{:s, 8}, {3}},
    {{:u, 16}, {3}},
    {{:s, 16}, {3}},
    {{:u, 32}, {3, 1}},
    {{:s, 32}, {1, 3}},
    {{:u, 64}, {3}},
    {{:s, 64}, {3}},
    {{:f, 16}, {3}},
    {{:bf, 16}, {3}},
    {{:f, 32}, {}},
    {{:f, 64}, {3}},
    {{:c, 64}, {3}},
    {{:f, 8}, {3}},
    {{:f8_e4m3fn, 8}, {3}},
    {{:f8_e8m0, 8}, {3}},
    {{:f8_e4m3fnuz, 8}, {3}},
    {{:f8_e5m2fnuz, 8}, {3}},
    {{:f6_e2m3, 6}, {4}},
    {{:f6_e3m2, 6}, {4}},
    {{:f4, 4}, {2, 2}},
    {{:f, 32}, {0, 5}}
  ]

  defp tensors do
    for {{{_name, bits} = type, shape}, place} <- Enum.with_index(@types), into: %{} do
      {"t#{place}",
       Tensor.new(type, shape, :crypto.strong_rand_bytes(div(Tuple.product(shape) * bits, 8)))}
    end
  end

  test "what is written is read, in every type", %{tmp_dir: dir} do
    path = Path.join(dir, "all.safetensors")
    tensors = tensors()
    assert :ok = Safetensors.write(path, tensors, metadata: %{"format" => "mlx"})
    assert {:ok, ^tensors} = Safetensors.read(path)
    assert {:ok, header} = Safetensors.read_header(path)
    assert header["__metadata__"] == %{"format" => "mlx"}
    assert header["t10"] == %{dtype: "BF16", type: {:bf, 16}, shape: {3}}
    assert map_size(header) == length(@types) + 1
    assert {:ok, one} = Safetensors.read_tensor(path, "t5")
    assert one == tensors["t5"]
    assert {:ok, some} = Safetensors.read(path, only: ["t1", "t2"])
    assert Map.keys(some) == ["t1", "t2"]
    # As any other file that this process makes.
    File.write!(path <> ".other", "")
    assert File.stat!(path).mode == File.stat!(path <> ".other").mode
  end

  test "a file may be written in place of one that is read", %{tmp_dir: dir} do
    path = Path.join(dir, "one.safetensors")
    :ok = Safetensors.write(path, %{"a" => Tensor.new({:u, 8}, {4}, "old!")})
    {:ok, %{"a" => old}} = Safetensors.read(path)
    :ok = Safetensors.write(path, %{"a" => Tensor.new({:u, 8}, {4}, "new!")})
    assert old.binary == "old!"
    assert {:ok, %{"a" => %{binary: "new!"}}} = Safetensors.read(path)
  end

  test "a checkpoint is its shards, and as large as it says" do
    {:ok, tensors} = Safetensors.read(Fixtures.checkpoint("f32-three-shards"))
    {:ok, header} = Safetensors.read_header(Fixtures.checkpoint("f32-three-shards"))
    assert Enum.sort(Map.keys(tensors)) == Enum.sort(Map.keys(header) -- ["__metadata__"])
    assert %Tensor{type: {:u, 32}, shape: {_, _}} = tensors["model.embed_tokens.weight"]
    assert %Tensor{type: {:f, 32}} = tensors["model.norm.weight"]

    shards = Path.wildcard(Path.join(Fixtures.checkpoint("f32-three-shards"), "*.safetensors"))
    assert length(shards) == 3

    for shard <- shards, {name, tensor} <- elem(Safetensors.read(shard), 1) do
      assert tensors[name] == tensor
    end
  end

  test "a tensor outlives the call that read it, and a file that shrinks is not the end", %{
    tmp_dir: dir
  } do
    path = Path.join(dir, "large.safetensors")
    bytes = :crypto.strong_rand_bytes(1_000_000)
    :ok = Safetensors.write(path, %{"a" => Tensor.new({:u, 8}, {1_000_000}, bytes)})
    {:ok, tensor} = Safetensors.read_tensor(path, "a")
    :erlang.garbage_collect()
    assert tensor.binary == bytes
    File.write!(path, "short")
    assert byte_size(:binary.copy(tensor.binary)) == 1_000_000
  end

  test "what is wrong is told", %{tmp_dir: dir} do
    path = Path.join(dir, "bad.safetensors")
    assert {:error, %Error{reason: :not_found}} = Safetensors.read(path)
    File.write!(path, <<100::little-64, "{}">>)

    assert {:error, %Error{reason: :bad_checkpoint, message: message}} =
             Safetensors.read_header(path)

    assert message =~ "bad.safetensors"
    :ok = Safetensors.write(path, %{a: Tensor.new({:u, 8}, {1}, "a")})
    assert {:error, %Error{reason: :not_found}} = Safetensors.read_tensor(path, "b")
    nowhere = Path.join(dir, "nowhere/file.safetensors")
    assert {:error, %Error{reason: :io}} = Safetensors.write(nowhere, %{})
    assert_raise ArgumentError, ~r/4 bytes/, fn -> Tensor.new({:f, 32}, {1}, "abc") end

    assert_raise ArgumentError, ~r/Bombus.Tensor or an Nx.Tensor/, fn ->
      Safetensors.write(path, %{"a" => 1})
    end

    assert_raise ArgumentError, ~r/:metadata/, fn ->
      Safetensors.write(path, %{}, metadata: %{a: 1})
    end

    odd = %{"a" => %Tensor{type: {:c, 128}, shape: {0}, binary: ""}}
    assert_raise ArgumentError, ~r/of the format/, fn -> Safetensors.write(path, odd) end
    twice = [{"a", Tensor.new({:u, 8}, {1}, "a")}, {:a, Tensor.new({:u, 8}, {1}, "b")}]
    assert_raise ArgumentError, ~r/different names/, fn -> Safetensors.write(path, twice) end
    named = %{"__metadata__" => Tensor.new({:u, 8}, {1}, "a")}
    assert_raise ArgumentError, ~r/__metadata__/, fn -> Safetensors.write(path, named) end
    assert_raise ArgumentError, ~r/a path/, fn -> Safetensors.read(:demo) end
    assert_raise ArgumentError, ~r/:as/, fn -> Safetensors.read(path, as: :numpy) end
  end

  test "a tensor says what it is" do
    assert inspect(Tensor.new({:bf, 16}, {2, 3}, <<0::96>>)) == "#Bombus.Tensor<bf16[2][3]>"
    assert inspect(Tensor.new({:f8_e4m3fn, 8}, {}, <<0>>)) == "#Bombus.Tensor<f8_e4m3fn>"
  end

  describe "with Nx" do
    @describetag :nx

    test "tensors go to Nx and back", %{tmp_dir: dir} do
      path = Path.join(dir, "nx.safetensors")

      for {type, shape} <- @types,
          elem(type, 0) not in [
            :bool,
            :f8_e8m0,
            :f8_e4m3fnuz,
            :f8_e5m2fnuz,
            :f6_e2m3,
            :f6_e3m2,
            :f4
          ],
          Tuple.product(shape) > 0 do
        nx = Nx.iota(shape) |> Nx.as_type(type)
        tensor = Tensor.from_nx(nx)
        assert tensor.type == type and tensor.shape == shape
        assert Tensor.to_nx(tensor) == nx
        :ok = Safetensors.write(path, %{"a" => nx, "b" => tensor})
        assert {:ok, %{"a" => ^nx, "b" => ^nx}} = Safetensors.read(path, as: :nx)
      end

      assert Tensor.to_nx(Tensor.new({:bool, 8}, {2}, <<1, 0>>)) == Nx.tensor([1, 0], type: :u8)

      assert_raise ArgumentError, ~r/a type that Nx has/, fn ->
        Tensor.to_nx(Tensor.new({:f4, 4}, {2}, "a"))
      end
    end
  end
end
